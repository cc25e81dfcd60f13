"""The whole examination."""

from __future__ import annotations

import logging

from serve.doctor.access import check_access
from serve.doctor.findings import Finding
from serve.doctor.gpus import check_gpus
from serve.doctor.machine import check_machine
from serve.doctor.model_files import check_concepts, check_models
from serve.doctor.patience import check_patience
from serve.doctor.redis_servers import check_redis_servers
from serve.doctor.result_store import check_results
from serve.doctor.server import check_server
from serve.doctor.versions import check_versions
from serve.settings.tree import Settings


def examine(settings: Settings, url: str, *, here: bool) -> list[Finding]:
    """Everything, in the order in which it is of use to mend it. `url` is where a running server is looked for; `here`
    says that it would be the one with these settings, so that its ports are not free."""
    # What the parts say of a failure to their logs is told as a finding.
    logging.getLogger("serve").addHandler(logging.NullHandler())
    server = check_server(url)
    models, whole = check_models(settings)
    return [
        *check_versions(settings),
        *check_machine(settings, serving=here and server.serving),
        *check_redis_servers(settings),
        *check_patience(settings),
        *check_results(settings),
        *models,
        *check_concepts(settings, whole),
        *check_gpus(settings, whole),
        *check_access(settings),
        *server.findings,
    ]
