"""What a visible training loop needs and gets wrong easily."""
