"""moecc: a compiler that turns dense Transformers into sparse mixtures of experts."""

from moecc.version import __version__ as __version__
