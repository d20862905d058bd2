"""`python -m census_tf_dagster`."""

import sys

from census_tf_dagster.cli import main

sys.exit(main())
