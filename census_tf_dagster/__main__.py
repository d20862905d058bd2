"""Lets `python -m census_tf_dagster` run the same commands as the installed `census-tf-dagster`."""

import sys

from census_tf_dagster.cli import main

sys.exit(main())
