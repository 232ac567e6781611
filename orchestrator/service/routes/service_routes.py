"""Routes about the service itself: GPUs, metrics for Prometheus, and the page of this API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from jinja2 import Environment, StrictUndefined

from orchestrator.gpu_locks import gpu_holders
from orchestrator.gpus import visible_devices
from orchestrator.service.service_context import ServiceContext, Viewer, as_json
from orchestrator.service.service_measures import MEDIA_TYPE, exposition

STYLE_URL = "/api/v1/docs.css"
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; }
section { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .5rem 0; }
h3 { margin: .25rem 0; font-size: 1rem; overflow-wrap: anywhere; }
h3 b { display: inline-block; min-width: 4.5rem; }
p { margin: .25rem 0; }
table { border-collapse: collapse; margin: .5rem 0; }
td { padding: .15rem .75rem .15rem 0; vertical-align: top; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{{ style }}">
</head>
<body>
<h1>{{ title }}: API</h1>
<p>Send <code>Authorization: Bearer TOKEN</code>. Errors are <code>application/problem+json</code> with the sentence of
the command line in <code>detail</code>. For programs: <a href="{{ schema }}">the OpenAPI document</a>.</p>
{% for subject, operations in subjects.items() %}
<h2>{{ subject }}</h2>
{% for one in operations %}
<section>
<h3><b>{{ one.method }}</b> <code>{{ one.path }}</code></h3>
<p>{{ one.text }}</p>
{% if one.inputs %}
<table>
{% for name, kind, text in one.inputs %}
<tr><td><code>{{ name }}</code></td><td>{{ kind }}</td><td>{{ text }}</td></tr>
{% endfor %}
</table>
{% endif %}
</section>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def service_routes(context: ServiceContext, app: FastAPI, problem: Callable[[], str]) -> APIRouter:
    """Return the routes. `problem`: returns what keeps sweeps from starting."""
    routes = APIRouter(tags=["service"])

    @routes.get("/metrics", response_class=PlainTextResponse)
    def metrics(_: Viewer) -> Response:
        """Return the service's metrics in Prometheus' text format."""
        text = exposition(
            context.measures,
            [entry.values for entry in context.listed()],
            context.watchers.readers,
            problem(),
            time.time(),
        )
        return Response(text, media_type=MEDIA_TYPE)

    @routes.get("/api/v1/gpus")
    def gpus(_: Viewer) -> dict[str, Any]:
        """Return the GPUs of this machine, and which sweep of which user has each; `holder` is null for a free one."""
        devices = visible_devices()
        holders = gpu_holders(devices)
        return as_json(
            {
                "gpus": [
                    {
                        "index": device.index,
                        "vendor": device.vendor,
                        "sweep": holder.sweep if (holder := holders.get(device)) else None,
                        "holder": str(holder) if holder else None,
                    }
                    for device in devices
                ]
            }
        )

    @routes.get("/api/v1/docs", response_class=HTMLResponse)
    def docs(_: Viewer) -> HTMLResponse:
        """Return this page: every route with what it takes."""
        template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(_PAGE)
        schema = app.openapi()
        page = template.render(title=app.title, style=STYLE_URL, schema=app.openapi_url, subjects=_subjects(schema))
        return HTMLResponse(page)

    @routes.get(STYLE_URL, include_in_schema=False)
    def style() -> Response:
        return Response(_STYLE, media_type="text/css")

    return routes


def _subjects(schema: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the operations of an OpenAPI document by tag."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            text = " ".join(str(operation.get("description", "")).split())
            one = {"method": method.upper(), "path": path, "text": text, "inputs": _inputs(schema, operation)}
            found.setdefault(next(iter(operation.get("tags", ())), "service"), []).append(one)
    return found


def _inputs(schema: Mapping[str, Any], operation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, kind and description of each parameter and each field of the body."""
    found = [(each["name"], each["in"], str(each.get("description", ""))) for each in operation.get("parameters", ())]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    for part in (content, *content.get("anyOf", ())):
        name = str(part.get("$ref", "")).rpartition("/")[2]
        fields = schema.get("components", {}).get("schemas", {}).get(name, {}).get("properties", {})
        found += [(field, "body", str(about.get("description", ""))) for field, about in fields.items()]
    return found
