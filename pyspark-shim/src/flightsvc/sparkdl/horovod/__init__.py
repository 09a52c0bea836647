"""Names of sparkdl that ran Horovod; see :mod:`flightsvc.sparkdl.removed`."""

from flightsvc.sparkdl.removed import removed

__getattr__ = removed(
    __name__,
    "HorovodRunner",
    log_to_driver="print in the function that trains: what it prints is in the logs of its executor",
)
