"""The few-shot bench: cards x methods x shots x seeds as jobs that any number of processes share, and their tables."""
