"""Names of TF frames: which ones TF can have. One check for parameters, ``objects.yaml`` and recordings."""

from __future__ import annotations


def refusal(name: str) -> str:
    """Why TF can't have a frame of this name; empty if it can.

    tf2 refuses empty names and a leading slash; a message's string can hold neither NUL nor what is no
    Unicode text.
    """
    if not name.strip():
        return "it is empty: give the frame a name"
    if name.startswith("/"):
        return "TF frames have no leading slash: leave it out"
    if "\0" in name:
        return "it holds a NUL character"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "it is no Unicode text"
    return ""


def prefix_refusal(prefix: str) -> str:
    """Why TF can't have frames whose names begin like this; empty if it can. An empty prefix is none."""
    return refusal(prefix) if prefix else ""
