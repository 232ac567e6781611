"""Routes of uploaded files: how much of one is there, its next part, and the model that several of them make."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from orchestrator.service.service_context import Operator, ServiceContext
from orchestrator.service.uploaded_files import Announced

Size = Annotated[int, Query(ge=0, description="Bytes of the whole file.")]
FileName = Annotated[str, Query(max_length=100, description="The file's name without folders.")]


class ModelFile(BaseModel):
    """One file of a model."""

    model_config = ConfigDict(extra="forbid")

    sha256: str = Field(max_length=64)
    size: int = Field(ge=0, description="Bytes.")


class ModelFiles(BaseModel):
    """The files of a model."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=100, description="Name of the model's folder.")
    files: dict[str, ModelFile] = Field(max_length=2000, description="By name, without folders.")


def file_routes(context: ServiceContext) -> APIRouter:
    """Return the routes."""
    routes, files = APIRouter(prefix="/api/v1/files", tags=["files"]), context.submissions.uploads

    @routes.post("/models")
    def make_model(person: Operator, body: ModelFiles) -> dict[str, Any]:
        """Make a model of uploaded files, or say which of them are `missing`. A submission names it by `model`."""
        described = {name: (file.sha256, file.size) for name, file in body.files.items()}
        model, missing = files.model(person.name, body.name, described)
        return {"model": model, "missing": missing, "complete": not missing}

    @routes.get("/{digest}")
    def offset(person: Operator, digest: str, size: Size, name: FileName) -> dict[str, Any]:
        """Return how many bytes of a file are here, by its SHA-256: the next part begins there."""
        file = Announced(digest, size, name)
        return {"offset": files.offset(person.name, file), "complete": files.path(person.name, file) is not None}

    @routes.post("/{digest}")
    async def append(
        person: Operator, request: Request, digest: str, size: Size, name: FileName, offset: Annotated[int, Query(ge=0)]
    ) -> dict[str, Any]:
        """Add a part of a file, whose bytes are the request's body. The last part is checked against the SHA-256."""
        file, data = Announced(digest, size, name), await request.body()
        reached = await run_in_threadpool(files.append, person.name, file, offset, data)
        return {"offset": reached, "complete": files.path(person.name, file) is not None}

    return routes
