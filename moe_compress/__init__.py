"""Makes Mixture-of-Experts checkpoints smaller and keeps what they know.

Importing this package is what lets the stock `from_pretrained` of transformers load the checkpoints it writes.
"""

__version__ = "0.1.0"

from .model import plugin as _plugin  # noqa: F401  registers itself with transformers
