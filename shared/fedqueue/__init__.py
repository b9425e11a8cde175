"""fedqueue: asynchronous federated learning over Redis and RQ.

A user's task needs `Task`, `Client`, `Fit` and, to emulate federations, `fedqueue.partition`.
Importing this package does not import torch.
"""

from fedqueue.errors import FedqueueError
from fedqueue.task import Client, Progress, Task, TrainResult

__version__ = "0.1.0"

__all__ = ["Client", "FedqueueError", "Progress", "Task", "TrainResult", "__version__"]
