"""What is seen: a defended model read as a refuse/comply classifier. `analysis.run` has it on one page."""

from pathlib import Path

__version__ = "0.1.0"


def data_folder() -> Path:
    """Return the folder of shipped data: inside this package once installed, beside it in a checkout."""
    inside = Path(__file__).parent / "data"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "data"
