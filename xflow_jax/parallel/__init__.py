"""Device mesh, sharding of arrays, and several processes as one program."""

from xflow_jax.parallel import multihost
from xflow_jax.parallel.mesh import (
    MESH_AXES,
    computation_scope,
    default_mesh,
    find_devices,
    make_mesh,
    nearest_divisor,
    parse_mesh,
    platform,
)
from xflow_jax.parallel.multihost import fetch_to_host, put_sharded
from xflow_jax.parallel.partitioning import (
    BATCH,
    LOGICAL,
    batch_sharding,
    batch_shards,
    constrain_batch,
    constrain_lookup,
    count_shards,
    divides,
    leaf_sharding,
    path_name,
    replicated,
)
from xflow_jax.parallel.shards import MERGE, WHOLE, Shard, parse_shard

__all__ = [
    "BATCH",
    "LOGICAL",
    "MERGE",
    "MESH_AXES",
    "WHOLE",
    "Shard",
    "batch_sharding",
    "batch_shards",
    "computation_scope",
    "constrain_batch",
    "constrain_lookup",
    "count_shards",
    "default_mesh",
    "divides",
    "fetch_to_host",
    "find_devices",
    "leaf_sharding",
    "make_mesh",
    "multihost",
    "nearest_divisor",
    "parse_mesh",
    "parse_shard",
    "path_name",
    "platform",
    "put_sharded",
    "replicated",
]
