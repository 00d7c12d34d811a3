"""The pods of a label selector that are ready and are not being deleted.

Within a pod, asks the cluster's API as the pod's service account, which needs `get` and `list` on pods.
"""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from hvdtrain.launch.hosts import HOST_NAME
from hvdtrain.system.errors import RunError
from hvdtrain.system.http import request_url

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
GPU_RESOURCE = "nvidia.com/gpu"
MAX_ANSWER_BYTES = 1 << 28  # a pod is about 10 KiB


@dataclass(frozen=True, kw_only=True)
class PodSelection:
    """Which pods, and how they are reached.

    Attributes:
        selector: labels, as kubectl's --selector.
        namespace: None for this pod's own.
        slots: of each pod; None for its limit of nvidia.com/gpu, or 1.
        by_name: name pods by their names, not by their IP addresses.
        domain: follows each name, such as `.workers`, if a headless service makes names resolve.
    """

    selector: str
    namespace: str | None = None
    slots: int | None = None
    by_name: bool = False
    domain: str = ""


@dataclass(frozen=True, kw_only=True)
class ApiAccess:
    """How the cluster's API is asked.

    Attributes:
        url: None for this cluster's.
        token_file: read each time, for the cluster changes it; not used without TLS, as with `kubectl proxy`.
        ca_file: who has signed the API's certificate.
        limit: seconds that a packet may take.
    """

    url: str | None = None
    token_file: Path = ACCOUNT / "token"
    ca_file: Path = ACCOUNT / "ca.crt"
    limit: float = 5


def find_ready_pods(selection: PodSelection, access: ApiAccess) -> list[str]:
    """Return `host:slots` of each pod that can be used now, sorted.

    Raises:
        RunError: the API cannot be asked, or its answer is not understood.
    """
    try:
        lines = [describe_pod(pod, selection) for pod in list_pods(selection, access)]
    except (AttributeError, LookupError, TypeError):
        raise RunError("the API's answer is not understood") from None
    except (OSError, ValueError) as error:
        raise RunError(" ".join(str(error).split()) or type(error).__name__) from None
    return sorted(line for line in lines if line is not None)


def list_pods(selection: PodSelection, access: ApiAccess) -> list[Any]:  # any JSON: what is read is checked there
    """Return the pods of a selector as the API describes them. Raises OSError, ValueError or RunError."""
    namespace = selection.namespace or (ACCOUNT / "namespace").read_text().strip()
    query = urllib.parse.urlencode({"labelSelector": selection.selector})
    path = f"api/v1/namespaces/{urllib.parse.quote(namespace, safe='')}/pods?{query}"
    url = f"{access.url or own_api_url(os.environ)}/{path}"
    headers = {"Accept": "application/json"}
    if url.startswith("https:"):
        headers["Authorization"] = f"Bearer {access.token_file.read_text().strip()}"
    response = request_url(
        url, headers=headers, timeout=access.limit, ca_file=access.ca_file, max_bytes=MAX_ANSWER_BYTES
    )
    if response.status != HTTPStatus.OK:
        raise RunError(f"the API answers {response.status} {HTTPStatus(response.status).phrase}")
    answer = json.loads(response.text)
    pods = answer.get("items") if isinstance(answer, dict) else None
    if not isinstance(pods, list):
        raise RunError("the API's answer holds no list of pods")
    return pods


def own_api_url(environ: Mapping[str, str]) -> str:
    """Return the address of the API of the cluster in whose pod this runs. Raises RunError if this is not a pod."""
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        raise RunError("not within a pod (KUBERNETES_SERVICE_HOST is not set); give --url")
    return f"https://{f'[{host}]' if ':' in host else host}:{environ.get('KUBERNETES_SERVICE_PORT', '443')}"


def describe_pod(pod: Any, selection: PodSelection) -> str | None:
    """Return `host:slots` of a pod; None if it is not ready, or is being deleted.

    Raises:
        RunError: it has no address that Horovod can use.
        AttributeError, LookupError, TypeError: it is not a pod.
    """
    metadata, status = pod.get("metadata", {}), pod.get("status", {})
    ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in status.get("conditions") or []
    )
    if metadata.get("deletionTimestamp") or status.get("phase") != "Running" or not ready:
        return None
    host = metadata.get("name", "") + selection.domain if selection.by_name else status.get("podIP", "")
    if not HOST_NAME.match(host):
        raise RunError(f"pod {metadata.get('name')}: {host!r} is not a host name or IPv4 address, which Horovod needs")
    return f"{host}:{selection.slots or count_gpus(pod) or 1}"


def count_gpus(pod: Any) -> int:
    """Return the limit of GPUs of all containers of a pod."""
    limits = [(container.get("resources") or {}).get("limits") or {} for container in pod["spec"]["containers"]]
    return sum(int(limit.get(GPU_RESOURCE, 0)) for limit in limits)
