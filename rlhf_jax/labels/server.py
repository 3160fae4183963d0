"""The HTTP server of the page that people label on (Starlette).

Three files that hold nothing of the run (``page.html``, its script and its style), and
three calls that need a labeller's token: ``GET /state``, ``POST /answer``,
``POST /undo``. A token stands behind the ``#`` of a link, which browsers do not send;
the page sends it in the header ``Authorization``. So it is in no log, and no other site
can use it. Nothing comes from outside: the content security policy forbids it. Read
``page.js`` next.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from rlhf_jax.labels.session import Closed, Conflict, Session
from rlhf_jax.labels.store import Unusable

FOLDER = Path(__file__).parent
ASSETS = {
    '/': ('page.html', 'text/html'),
    '/page.css': ('page.css', 'text/css'),
    '/page.js': ('page.js', 'text/javascript'),
    '/answers.js': ('answers.js', 'text/javascript'),
    '/differences.js': ('differences.js', 'text/javascript'),
    '/markdown.js': ('markdown.js', 'text/javascript'),
}
LARGEST = 64 * 1024  # bytes of a request
HEADERS = {
    'Content-Security-Policy': (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    'X-Content-Type-Options': 'nosniff',
    'X-Frame-Options': 'DENY',
    'Referrer-Policy': 'no-referrer',
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Cache-Control': 'no-store',
}


def make_app(
    session: Session,
    on_answer: Callable[[], None] = lambda: None,
    on_refused: Callable[[str, int], None] = lambda host, count: None,
) -> Starlette:
    """The application.

    Args:
        session: the labelling of a stage.
        on_answer: called behind every answer that was stored or undone.
        on_refused: called with the address of a request with a wrong token, and how
            many there were.
    """
    plan = session.book.plan

    def labeller_of(request: Request) -> str | None:
        scheme, _, token = request.headers.get('authorization', '').partition(' ')
        found = None
        for name, own in session.store.tokens(plan.labellers).items():
            if secrets.compare_digest(own.encode(), token.encode()):
                found = name
        return found if scheme == 'Bearer' else None

    def call(
        request: Request, work: Callable[[str], dict[str, Any]], changes: bool
    ) -> Response:
        try:
            labeller = labeller_of(request)
            if labeller is None:
                host = request.client.host if request.client else 'unknown'
                on_refused(host, session.store.refuse())
                return _error(403, 'this link is not valid; ask for a new one')
            value = work(labeller)
        except Conflict as error:
            return _error(409, str(error), state=session.state(labeller))
        if changes:
            on_answer()
        return _json(value)

    def get_state(request: Request) -> Response:
        return _guarded(lambda: call(request, session.begin, False))

    async def post(
        request: Request, work: Callable[[str, dict[str, Any]], dict[str, Any]]
    ) -> Response:
        body = await _body(request)
        if body is None:
            return _error(413, f'a request has at most {LARGEST} bytes')
        sent = _object(body)

        def worked(labeller: str) -> dict[str, Any]:
            if sent is None:
                raise BadRequest('the request is no JSON object')
            try:
                return work(labeller, sent)
            except (Conflict, Closed, Unusable):
                raise
            except ValueError as error:
                raise BadRequest(str(error)) from error

        return await run_in_threadpool(_guarded, lambda: call(request, worked, True))

    async def post_answer(request: Request) -> Response:
        return await post(request, session.answer)

    async def post_undo(request: Request) -> Response:
        return await post(request, session.undo)

    return Starlette(
        routes=[
            *(Route(path, _asset) for path in ASSETS),
            Route('/state', get_state),
            Route('/answer', post_answer, methods=['POST']),
            Route('/undo', post_undo, methods=['POST']),
        ]
    )


class BadRequest(Exception):
    """A request that the page does not make."""


def _guarded(respond: Callable[[], Response]) -> Response:
    """The answer to what cannot be done. The page sends an answer again where the
    database could not be written (503).
    """
    try:
        return respond()
    except BadRequest as error:
        return _error(400, str(error))
    except Closed as error:
        return _error(409, str(error))
    except Unusable as error:
        print(f'error: {error}', flush=True)
        return _error(503, 'the answer could not be stored; it is sent again')


def _asset(request: Request) -> Response:
    name, kind = ASSETS[request.url.path]
    text = (FOLDER / name).read_text(encoding='utf-8')
    return Response(text, media_type=kind, headers=HEADERS)


async def _body(request: Request) -> bytes | None:
    """The body of a request, or None where it is too large."""
    body = b''
    try:
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                return None
    except ClientDisconnect:
        return b''
    return body


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _error(status: int, message: str, **more: Any) -> Response:
    return _json({'error': message, **more}, status)


def _json(value: Any, status: int = 200) -> Response:
    """JSON in ASCII, which also holds half a surrogate pair."""
    kind = 'application/json'
    return Response(json.dumps(value), status, headers=HEADERS, media_type=kind)
