"""A pod has addresses of its own: what listens on all of them listens on the pod's, and never in a neighbour's place.

Python finds this file by PYTHONPATH at the start of each process of a pod (tests/support/pods.py).
"""

import os
import socket

_POD = os.environ.get("POD_IP")
_bind = socket.socket.bind


def _bind_in_the_pod(self, address):
    if _POD and self.family == socket.AF_INET and address[0] in ("", "0.0.0.0"):
        address = (_POD, *address[1:])
    return _bind(self, address)


socket.socket.bind = _bind_in_the_pod
