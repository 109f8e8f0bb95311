"""What a submission checks, and then what a dry run prints: `python -m tests.launch.submission OVERRIDES`."""

import sys

from dsft.compose import compose
from dsft.preflight import preflight
from dsft.run import main
from dsft.wording import refuse

if __name__ == "__main__":
    try:
        preflight(compose(sys.argv[1:]))
    except ValueError as error:
        refuse(error)
    sys.exit(main(sys.argv[1:]))
