#!/usr/bin/env python3
"""Print `host:slots` for the pods of a label selector that are ready and are not about to be deleted.

    kubernetes.py --selector app=train,role=worker [--namespace NS] [--slots N] [--by ip|name] [--domain .workers]
                  [--url https://...] [--token-file F] [--ca-file F] [--limit 5]

Within a pod: asks the cluster's API as the pod's service account, which needs `get` and `list` on pods. Slots are
--slots, or the pod's limit of nvidia.com/gpu, or 1. Pods are named by IP, or by name, with --domain behind it, where a
headless service makes names resolve.

Standard library only, Python 3.10 or later.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Trouble(Exception):
    """Shown as one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Print host:slots for the ready pods of a label selector.")
    parser.add_argument("--selector", required=True, help="labels, as kubectl's --selector")
    parser.add_argument("--namespace", help="default: this pod's own")
    parser.add_argument("--slots", type=positive, help="ranks of each pod")
    parser.add_argument("--by", choices=["ip", "name"], default="ip", help="how pods are reached")
    parser.add_argument("--domain", default="", help="behind each name, such as .workers")
    parser.add_argument("--url", help="default: this cluster's API")
    parser.add_argument("--token-file", type=Path, default=ACCOUNT / "token")
    parser.add_argument("--ca-file", type=Path, default=ACCOUNT / "ca.crt")
    parser.add_argument("--limit", type=float, default=5, help="seconds that the API may take")
    options = parser.parse_args()
    # The time-out of a socket is for each packet: this one is for all.
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, options.limit)
    try:
        lines = sorted(line for pod in ask(options) if (line := line_of(pod, options)) is not None)
    except urllib.error.HTTPError as error:
        return fail(f"the API answers {error.code} {error.reason}")
    except (AttributeError, LookupError, TypeError):
        return fail("the API's answer is not understood")
    except (OSError, ValueError, HTTPException, Trouble) as error:
        return fail(str(error) or type(error).__name__)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def fail(text: str) -> int:
    print(f"kubernetes.py: {' '.join(text.split())}", file=sys.stderr)
    return 1


def out_of_time(*_: object) -> NoReturn:
    raise Trouble("the API has not answered in time")


def ask(options: argparse.Namespace) -> list[Any]:
    """The pods. Raises OSError, ValueError or Trouble."""
    namespace = options.namespace or (ACCOUNT / "namespace").read_text().strip()
    query = urllib.parse.urlencode({"labelSelector": options.selector})
    url = f"{options.url or own_api()}/api/v1/namespaces/{urllib.parse.quote(namespace, safe='')}/pods?{query}"
    headers = {"Accept": "application/json"}
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # the API is within the cluster
    if url.startswith("https:"):
        # Read anew each time, for the cluster changes it. Without TLS (`kubectl proxy`) it is told to nobody.
        headers["Authorization"] = f"Bearer {options.token_file.read_text().strip()}"
        handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=options.ca_file)))
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(*handlers).open(request, timeout=options.limit) as response:
        answer = json.load(response)
    pods = answer.get("items") if isinstance(answer, dict) else None
    if not isinstance(pods, list):
        raise Trouble("the API's answer holds no list of pods")
    return pods


def own_api() -> str:
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        raise Trouble("not within a pod (KUBERNETES_SERVICE_HOST is not set); give --url")
    return f"https://{f'[{host}]' if ':' in host else host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"


def line_of(pod: dict[str, Any], options: argparse.Namespace) -> str | None:
    """`host:slots` of a pod; None if it is not ready, or is about to go. Raises Trouble."""
    about, status = pod.get("metadata", {}), pod.get("status", {})
    ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in status.get("conditions") or []
    )
    if about.get("deletionTimestamp") or status.get("phase") != "Running" or not ready:
        return None
    host = about.get("name", "") + options.domain if options.by == "name" else status.get("podIP", "")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", host, re.ASCII):
        raise Trouble(f"pod {about.get('name')}: {host!r} is not a host name or IPv4 address, which Horovod needs")
    return f"{host}:{options.slots or gpus(pod) or 1}"


def gpus(pod: dict[str, Any]) -> int:
    limits = [(container.get("resources") or {}).get("limits") or {} for container in pod["spec"]["containers"]]
    return sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)


if __name__ == "__main__":
    sys.exit(main())
