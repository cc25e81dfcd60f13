"""A Ray cluster of several nodes on this machine, each with a label and GPUs that are only pretended."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence

import ray
from ray._private import worker
from ray.cluster_utils import Cluster

from serve.placements import GPU_CLASS_LABEL

STORE_BYTES = 80 * 1024 * 1024


@contextlib.contextmanager
def labelled_nodes(gpu_classes: Sequence[str]) -> Iterator[dict[str, str]]:
    """A head node without GPUs, and for each class a node with one GPU and its label.

    Gives node id -> class. This process is the driver; everything listens on loopback and ends with the context.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:  # short: Ray keeps Unix sockets in it
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        # A Cluster that starts its own head can't be joined over loopback: Ray replaces that address by the machine's.
        nodes = Cluster(shutdown_at_exit=False)
        nodes.head_node = worker._global_node
        nodes.redis_address = nodes.head_node.redis_address
        try:
            for gpu_class in gpu_classes:
                nodes.add_node(
                    num_cpus=2,
                    num_gpus=1,
                    labels={GPU_CLASS_LABEL: gpu_class},
                    object_store_memory=STORE_BYTES,
                    node_ip_address="127.0.0.1",
                    temp_dir=folder,
                )
            yield {
                node["NodeID"]: node["Labels"][GPU_CLASS_LABEL]
                for node in ray.nodes()
                if GPU_CLASS_LABEL in node["Labels"]
            }
        finally:
            for node in list(nodes.worker_nodes):
                nodes.remove_node(node)
            ray.shutdown()
