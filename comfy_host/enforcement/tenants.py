"""Whose a request is: what a reverse proxy says in a header, believed only from the addresses that the policy lists.

ComfyUI hands its prompt handlers the request's JSON alone, so that a middleware of its web application keeps the name
for them (``PromptServer.app``), and a queued prompt carries a ticket that stands for it: what a client sends along
under the same key is replaced.
"""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from server import PromptServer

from ...modular_lora.errors import GuardError
from ...modular_lora.util.cache import Cache
from ...operators.policy import OperatorPolicy
from ...operators.policy import Tenants as Rules
from . import policy as policies

TICKET = "modular_lora_ticket"  # of a queued prompt's extra_data
MOST_TICKETS = 65_536  # prompts that may wait
MOST_NAME = 128  # characters
NOBODYS = (  # rule, reason, remedy
    "tenants.header",
    "nobody says whose prompt this is",
    "send it through the operator's proxy",
)

_tickets: Cache[str, str] = Cache(MOST_TICKETS)  # -> the tenant


def register() -> None:
    """Add the middleware; a server without an application (a test's) has none."""
    if (app := getattr(PromptServer.instance, "app", None)) is not None:
        app.middlewares.append(_identified)


@web.middleware
async def _identified(request: web.Request, handler: Any) -> web.StreamResponse:
    token = policies.tenant.set(_named(request))
    try:
        return await handler(request)
    finally:
        policies.tenant.reset(token)


def _named(request: web.Request) -> str:
    """The tenant that a request's proxy names; "" where the policy asks for none or nobody says it."""
    try:
        policy = policies.current()
    except GuardError:
        return ""
    if policy is None or not policy.tenants.header or not _listed(policy.tenants, request):
        return ""
    said = request.headers.getall(policy.tenants.header, [])
    name = said[0].strip() if len(said) == 1 else ""  # a second one is the client's own
    return name if 0 < len(name) <= MOST_NAME and name.isprintable() else ""


def _listed(rules: Rules, request: web.Request) -> bool:
    """Whether a request came over a connection from one of the proxies; X-Forwarded-For and its like say nothing."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0] if peer else "")
    except ValueError:  # a socket of another kind
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in ipaddress.ip_network(one) for one in rules.proxies)


def unknown(policy: OperatorPolicy) -> bool:
    """Whether the policy asks whose prompt this is, and nobody says it."""
    return bool(policy.tenants.header) and not policy.tenant


def ticket(policy: OperatorPolicy, said: Mapping[str, Any]) -> dict[str, Any]:
    """The extra_data of a prompt that is about to be queued, with a ticket for its tenant."""
    if not policy.tenant:
        return {}
    sent = said.get("extra_data")
    made = uuid.uuid4().hex
    _tickets.put(made, policy.tenant)
    return {"extra_data": {**(sent if isinstance(sent, Mapping) else {}), TICKET: made}}


def of(extra_data: Any) -> str:
    """The tenant of a prompt that begins to run; "" where it was queued without a ticket.

    A ticket is good once: ``GET /queue`` shows it to everybody.
    """
    made = extra_data.get(TICKET) if isinstance(extra_data, Mapping) else None
    found = _tickets.get(made) if isinstance(made, str) else None
    _tickets.drop(lambda one: one == made)
    return found or ""
