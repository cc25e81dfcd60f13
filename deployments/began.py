"""When this process began to import what replicas stand on. Imported first, and by nobody else."""

import time

AT = time.time()
