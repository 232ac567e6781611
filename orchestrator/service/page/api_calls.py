"""`ApiCalls`: pages do what the API does by calling its functions, with the rights that its routes demand.

So a button and a request to the API check the same things and leave the same traces in the sweep's history.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, get_type_hints

from fastapi import APIRouter, HTTPException
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.service_context import Admin, Operator, Viewer

_ROLES = ((Admin, Role.ADMIN), (Operator, Role.OPERATOR), (Viewer, Role.VIEWER))


class ApiCalls:
    """The functions of the API's routes, for pages that do the same."""

    def __init__(self, *routers: APIRouter) -> None:
        """`routers`: with paths below `/api/v1`."""
        self._endpoints: dict[tuple[str, str], Callable[..., Any]] = {
            (method, route.path.removeprefix("/api/v1")): route.endpoint
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute)
            for method in route.methods or ()
        }

    def role(self, method: str, path: str) -> Role:
        """Return the least role that may call a route."""
        hints = get_type_hints(self._endpoints[method, path], include_extras=True)
        return next(role for kind, role in _ROLES if kind in hints.values())

    def call(self, person: Person, method: str, path: str, body: Mapping[str, Any] | None = None, **values: Any) -> Any:
        """Call a route's function for a person.

        Args:
            person: who asks.
            method: of HTTP.
            path: of the route, without `/api/v1`, as `/sweeps/{name}/stop`.
            body: the values of its body.
            **values: its other parameters.

        Raises:
            HTTPException: the role is too low, or a value is refused.
        """
        role = self.role(method, path)
        if person.role < role:
            raise HTTPException(
                HTTPStatus.FORBIDDEN,
                f"this needs the role {role.name.lower()}; {person.name} is {person.role.name.lower()}",
            )
        endpoint = self._endpoints[method, path]
        hints = get_type_hints(endpoint, include_extras=True)
        parameters = inspect.signature(endpoint).parameters
        given: dict[str, Any] = {
            name: person for name in parameters if any(hints.get(name) == kind for kind, _ in _ROLES)
        }
        if body is not None:
            kind = next(each for each in _alternatives(hints["body"]) if issubclass(each, BaseModel))
            try:
                given["body"] = kind(**body)
            except ValidationError as error:
                found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
                raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, found) from error
        return endpoint(**given, **values)


def _alternatives(hint: Any) -> list[type]:
    return [each for each in (getattr(hint, "__args__", None) or (hint,)) if isinstance(each, type)]
