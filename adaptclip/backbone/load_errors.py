"""Words what went wrong while weights were loaded, and what to do about it."""

from __future__ import annotations

import pickle

from safetensors import SafetensorError

# How torch words that a pickle names a function or class beyond those that make tensors.
_CODE = ("Unsupported global", "Unsupported class", "reduce for unrecognized function")

# An empty pickle ends in StopIteration, the head of a torch archive in OSError.
_UNREADABLE = (SafetensorError, OSError, EOFError, StopIteration)


def explain(error: Exception, what: str) -> str:
    """Words what went wrong while weights were loaded, and what to do about it."""
    text = str(error)
    if "TorchScript" in text:
        return (
            f"{what} is a TorchScript program, not a file of weights, and programs are not run. Load it with "
            "torch.jit.load where you trust it, and save its state_dict() as safetensors."
        )
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text is not repeated: it advises to load the file again without the protection.
        code = next((line.strip() for line in text.splitlines() if any(word in line for word in _CODE)), "")
        code = code.removeprefix("WeightsUnpickler error: ").partition(" was not an allowed")[0]
        found = f"a pickle that would run code ({code})" if code else "damaged, or a pickle of more than weights"
        return f"{what} is {found}; it was refused and nothing in it was run. Copy it again, or ask for safetensors."
    # open_clip asserts the widths of position embeddings before it compares the rest.
    if "Error(s) in loading state_dict" in text or isinstance(error, AssertionError):
        lines = [line.strip() for line in text.splitlines() if line.strip() and "loading state_dict" not in line]
        shown = "; ".join(line if len(line) < 200 else line[:200] + " …" for line in lines[:3])
        return (
            f"{what} does not fit the architecture ({len(lines)} complaints; first: {shown}). Name the architecture "
            "it was trained with; an adapter alone is not a backbone."
        )
    if isinstance(error, _UNREADABLE) or "PytorchStreamReader" in text or "EOF" in text:
        return f"{what} is damaged, unreadable or not a checkpoint ({first_line(error)}). Copy or download it again."
    return f"{what} cannot be loaded: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its text, cut to 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no details'}"
