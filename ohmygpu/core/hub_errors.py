"""What a hub's refusals mean, in sentences that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import AccessDenied, ModelNotFound, NotFound, OhMyGPUError, RevisionNotFound
from .http import show_origin

if TYPE_CHECKING:
    import httpx2


def explain_refusal(
    response: httpx2.Response, endpoint: str, repo: str, revision: str | None, has_token: bool
) -> OhMyGPUError | None:
    """The error that a 4xx of the hub at `endpoint` means; None when it says nothing special."""
    code = response.headers.get("x-error-code", "")
    message = response.headers.get("x-error-message", "")
    status, where = response.status_code, show_origin(endpoint)
    if code == "GatedRepo":
        return _gated(endpoint, repo, has_token)
    if code == "RevisionNotFound":
        return RevisionNotFound(
            f"{repo} has no branch, tag or commit {revision!r}; see {endpoint}/{repo}",
            name=repo,
            revision=revision,
        )
    if code == "EntryNotFound":
        return NotFound(f"a file of {repo} is gone from {where}; pull again")
    if message == "Access to this resource is disabled.":
        return AccessDenied(f"{where} has disabled access to {repo}", name=repo)
    if status == 401 and has_token and code != "RepoNotFound":
        return AccessDenied(
            f"{where} does not accept the token in HF_TOKEN; check it, or unset it for public "
            "models",
            name=repo,
        )
    if code == "RepoNotFound" or status in (401, 404):
        return _missing(where, repo, has_token)
    if status == 403:
        reason = f" ({message[:200]})" if message and message.isprintable() else ""
        return AccessDenied(
            f"{where} refuses access to {repo}{reason}; HF_TOKEN needs a token that may read it",
            name=repo,
        )
    return None


def _gated(endpoint: str, repo: str, has_token: bool) -> AccessDenied:
    page = f"{endpoint}/{repo}"
    then = (
        "with the account of the token in HF_TOKEN"
        if has_token
        else "and set HF_TOKEN to a token of that account"
    )
    return AccessDenied(
        f"{repo} is gated: accept its licence at {page} {then}", name=repo, url=page
    )


def _missing(where: str, repo: str, has_token: bool) -> ModelNotFound:
    """A hub does not tell a private model from a missing one."""
    if_private = (
        "if it is private, the token in HF_TOKEN cannot read it"
        if has_token
        else "if it is private, set HF_TOKEN to a token that can read it"
    )
    return ModelNotFound(
        f"{where} has no model {repo}: check the name; {if_private}", name=repo, suggestions=[]
    )
