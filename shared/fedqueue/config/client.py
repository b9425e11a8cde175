"""The client that a task loads data for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Client:
    """A client of the federation and its share of a partitioned data set.

    `partition` counts from 0 and is below `partitions`. Both are None for a client that brings its own data.

    >>> from fedqueue import Client, partition
    >>> client = Client("client-1", partition=1, partitions=4)
    >>> partition.iid(8, clients=client.partitions)[client.partition]
    array([3, 6])
    """

    id: str
    partition: int | None = None
    partitions: int | None = None
