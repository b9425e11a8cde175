"""The types of what `fedqueue/__init__.py` imports at the first use of a name."""

from fedqueue import partition as partition
from fedqueue.config.loading import load_config as load_config
from fedqueue.config.schema import Config as Config
from fedqueue.config.training import TrainingConfig as TrainingConfig
from fedqueue.errors import ConfigurationError as ConfigurationError
from fedqueue.errors import FedqueueError as FedqueueError
from fedqueue.errors import JobClosed as JobClosed
from fedqueue.errors import MissingExtra as MissingExtra
from fedqueue.errors import PolicyRefusal as PolicyRefusal
from fedqueue.errors import RunExists as RunExists
from fedqueue.errors import RunFailed as RunFailed
from fedqueue.errors import RunNotFound as RunNotFound
from fedqueue.errors import ServerUnavailable as ServerUnavailable
from fedqueue.errors import TaskError as TaskError
from fedqueue.task import Client as Client
from fedqueue.task import Progress as Progress
from fedqueue.task import Task as Task
from fedqueue.task import TrainResult as TrainResult
from fedqueue.tensors.frame import Frame as Frame
from fedqueue.tensors.manifest import Manifest as Manifest
from fedqueue_coordinator.algorithms.aggregator import Accumulator as Accumulator
from fedqueue_coordinator.algorithms.aggregator import Aggregator as Aggregator
from fedqueue_coordinator.algorithms.aggregator import Contribution as Contribution
from fedqueue_coordinator.algorithms.aggregator import Step as Step
from fedqueue_coordinator.algorithms.aggregator import accumulate as accumulate
from fedqueue_coordinator.algorithms.aggregator import mean_step as mean_step
from fedqueue_coordinator.algorithms.fedbuff import fedbuff as fedbuff
from fedqueue_coordinator.core.run_summary import RunResult as RunResult
from fedqueue_coordinator.operator.python_api import run as run
from fedqueue_coordinator.operator.python_api import simulate as simulate
from fedqueue_coordinator.tracking.hooks import RunHooks as RunHooks
from fedqueue_coordinator.tracking.hooks import RunProgress as RunProgress
from fedqueue_coordinator.tracking.hooks import RunStart as RunStart

__version__: str
__all__: list[str]
