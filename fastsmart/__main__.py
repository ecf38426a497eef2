import sys

from fastsmart.cli import main

sys.exit(main())
