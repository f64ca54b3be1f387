"""A W&B server of our own at the edge of the network: it answers the queries that W&B's public clients send.

The answers have the shape that W&B's GraphQL schema documents; everything on this side of the socket is W&B's own code.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4
PROJECT = {
    "__typename": "Project", "id": "1", "internalId": "1", "name": "p", "entityName": "me", "isBenchmark": False,
    "createdAt": "2026-01-01T00:00:00Z", "user": None,
}  # fmt: skip
VIEWER = {"id": "u", "entity": "me", "username": "me", "email": "e", "flags": "{}", "teams": {"edges": []}}


@dataclass
class Server:
    """What the project `me/p` holds, and what was asked."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    address: str = ""

    def add(self, optimizer: str, seed: int, values: list[float], state: str = "finished", group: str = "g") -> None:
        name = f"{optimizer}{seed}"
        config = {
            "optim": {"name": optimizer},
            "seed": seed,
            "recipe": {"monitor": "val/loss", "mode": "min"},
        }
        self.runs.append(_run_node(name, f"r-{optimizer}-s{seed}", state, group, config))
        self.histories[name] = [
            {"_step": step, "trainer/global_step": step, "val/loss": value, "perf/seconds": step + 1.0}
            for step, value in enumerate(values)
        ]

    def environment(self) -> dict[str, str]:
        """What makes W&B's client talk to this server."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((query, variables))
        if "viewer {" in query:
            return {
                "viewer": {
                    "id": "u",
                    "entity": "me",
                    "username": "me",
                    "email": "e",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        if variables.get("project", "p") != "p":
            return {"project": None}
        if "query Runs(" in query:
            return {"project": self._runs(json.loads(variables["filters"] or "{}"))}
        if "RunHistoryKeys" in query:
            rows = self.histories[variables["name"]]
            keys = {key: {} for row in rows for key in row}
            return {"project": {"run": {"historyKeys": {"lastStep": len(rows) - 1, "keys": keys, "sets": []}}}}
        if "parquetHistory" in query:
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": [{"_step": 0}]}}}}
        if "query HistoryPage" in query:
            rows = self.histories[variables["run"]]
            page = [row for row in rows if variables["minStep"] <= row["_step"] < variables["maxStep"]]
            return {"project": {"run": {"history": [json.dumps(row) for row in page]}}}
        if "query RunFiles" in query:
            empty = {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}
            return {"project": {"internalId": "1", "run": {"fileCount": 0, "files": empty}}}
        if "query GetProjects" in query:
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"models": {"pageInfo": page, "edges": [{"node": PROJECT}]}}
        if "upsertView" in query:
            return {"upsertView": {"view": _view(variables), "inserted": True}}
        return {"project": PROJECT}

    def _runs(self, filters: dict[str, Any]) -> dict[str, Any]:
        nodes = [node for node in self.runs if filters.get("group") in (None, node["group"])]
        edges = [{"node": node, "cursor": node["name"]} for node in nodes]
        page = {"endCursor": None, "hasNextPage": False}
        return {"internalId": "1", "runCount": len(nodes), "readOnly": True, "runs": {"edges": edges, "pageInfo": page}}


@contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = server.answer(body.get("query", ""), body.get("variables") or {})
            self._send(200, json.dumps({"data": data}).encode())

        def do_GET(self) -> None:
            self._send(404, b"{}")

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Not on the terminal."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()


def _run_node(name: str, display_name: str, state: str, group: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"id-{name}", "name": name, "displayName": display_name, "state": state, "group": group, "tags": [],
        "config": json.dumps({key: {"value": value} for key, value in config.items()}), "summaryMetrics": "{}",
        "systemMetrics": "{}", "createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T00:00:00Z",
        "jobType": "train", "description": "", "notes": "", "commit": None, "readOnly": True, "projectId": "1",
        "historyLineCount": 3, "sweepName": None, "defaultColorIndex": 0, "user": {"name": "me", "username": "me"},
    }  # fmt: skip


def _view(variables: dict[str, Any]) -> dict[str, Any]:
    user = {"id": "u", "username": "me", "photoUrl": None, "admin": False, "name": "me"}
    return {
        "id": "dmlldzox", "type": variables.get("type"), "name": variables.get("name"),
        "displayName": variables.get("displayName"), "description": variables.get("description"),
        "project": {"id": "1", "name": "p", "entityName": "me"}, "spec": variables.get("spec"), "updatedAt": None,
        "createdAt": None, "user": user, "locked": False, "previewUrl": None, "viewCount": 0, "starCount": 0,
        "parentId": None,
    }  # fmt: skip
