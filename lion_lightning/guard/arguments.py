"""What LionGuard's arguments may be."""


def check_count(name: str, value: float) -> None:
    """Raises ValueError for a number below 0."""
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a word that is not one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
