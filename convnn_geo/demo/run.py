"""The demonstration from beginning to end."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convnn_geo import datasets, verify, viz
from convnn_geo.checks import check_int
from convnn_geo.console import print_table
from convnn_geo.demo import clouds, spectrum
from convnn_geo.demo.errors import print_errors
from convnn_geo.demo.neighbors import PHOTOGRAPH, PIXELS, WIDTH, along_spectrum, panel_title
from convnn_geo.demo.neighbors import spectrum as points_of_spectrum
from convnn_geo.demo.record import processor, versions, write_metrics
from convnn_geo.demo.report import Section, score_cells, write_report
from convnn_geo.demo.summary import Score, scores, sentences
from convnn_geo.demo.training import Run, Settings
from convnn_geo.demo.workers import Job, one_thread, run_jobs
from convnn_geo.extras import require
from convnn_geo.verify import Row
