"""What can't be collected here."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["convnn_geo/gpu/*.py"]
