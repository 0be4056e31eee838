"""OpenID Connect: authorization code with PKCE, state and nonce, through Authlib.

What the browser must bring back (state, nonce, code verifier) travels in a sealed cookie of ten minutes: it can be
neither forged nor used in another browser. Of the provider only the issuer is trusted, which the operator chose; its
metadata must name that issuer, its keys sign with an asymmetric algorithm, and every claim is checked before anything
is believed.
"""

import base64
import hmac
import json
import secrets
import time
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
import structlog
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.httpx_client import OAuth2Client
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry

from services.errors import Unauthenticated, Unavailable
from services.settings import Settings
from services.store.identities import Vouched

# Never HS256 (the client secret would be a signing key) and never "none".
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
ATTEMPT_SECONDS = 600
METADATA_SECONDS = 3600.0
KEYS_SECONDS = 60.0  # a token with an unknown key makes us ask for the keys again, but no oftener than this
LEEWAY_SECONDS = 60
TIMEOUT_SECONDS = 10.0
LARGEST_ANSWER = 1_000_000

log = structlog.get_logger()


class Attempt(NamedTuple):
    """One sign-in under way in one browser."""

    state: str
    nonce: str
    verifier: str


class Started(NamedTuple):
    """Where the browser goes, and the sealed attempt it must bring back."""

    url: str
    sealed: str


@dataclass
class _Known:
    """What the provider told, and when on the monotonic clock."""

    metadata: dict[str, Any]
    keys: KeySet
    at: float


class Provider:
    """The configured provider; thread-safe. What it publishes is fetched at the first use and kept for an hour."""

    def __init__(self, settings: Settings, pepper: bytes) -> None:
        self._settings = settings
        self._pepper = pepper
        self._known: _Known | None = None
        self._lock = Lock()

    @property
    def configured(self) -> bool:
        """Whether people may sign in this way at all."""
        return bool(self._settings.oidc_issuer)

    @property
    def name(self) -> str:
        """What the button says."""
        return self._settings.oidc_name

    def start(self, redirect_uri: str) -> Started:
        """Begin an attempt. Raises Unavailable when the provider does not answer properly."""
        attempt = Attempt(*(secrets.token_urlsafe(32) for _ in range(3)))
        endpoint = _endpoint(self._published().metadata, "authorization_endpoint")
        with self._client(redirect_uri) as client:
            url, _ = client.create_authorization_url(
                endpoint, state=attempt.state, code_verifier=attempt.verifier, nonce=attempt.nonce
            )
        return Started(url, self._seal(attempt))

    def finish(self, redirect_uri: str, sealed: str | None, answer: dict[str, str]) -> Vouched:
        """Who the provider says has come. Raises Unauthenticated for anything that does not add up."""
        attempt = self._open(sealed)
        if not hmac.compare_digest(answer.get("state", "").encode(), attempt.state.encode()):
            raise _refusal("the answer belongs to another sign-in", "state")
        if answer.get("iss", self._unsaid()) != self._settings.oidc_issuer:
            raise _refusal("the answer came from another provider", "iss")
        if "error" in answer or not answer.get("code"):
            raise _refusal("your provider did not sign you in", answer.get("error", "no code")[:100])
        token = self._exchange(redirect_uri, answer["code"], attempt.verifier)
        return self._vouched(self._verified(token, attempt.nonce))

    def _unsaid(self) -> str:
        """What an answer without `iss` stands for: nobody, where the provider says that it always names itself
        (RFC 9207), else the one there is."""
        always = self._published().metadata.get("authorization_response_iss_parameter_supported") is True
        return "" if always else self._settings.oidc_issuer

    # --- with the provider --------------------------------------------------------------------------------

    def _client(self, redirect_uri: str) -> OAuth2Client:
        settings = self._settings
        return OAuth2Client(
            client_id=settings.oidc_client_id, client_secret=settings.oidc_client_secret or None,
            scope="openid email profile", redirect_uri=redirect_uri, code_challenge_method="S256",
            timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False,
        )  # fmt: skip

    def _exchange(self, redirect_uri: str, code: str, verifier: str) -> dict[str, Any]:
        endpoint = _endpoint(self._published().metadata, "token_endpoint")
        try:
            with self._client(redirect_uri) as client:
                token: dict[str, Any] = client.fetch_token(
                    endpoint, grant_type="authorization_code", code=code, code_verifier=verifier
                )
        except OAuthError as error:
            raise _refusal("your provider refused the code", str(error)[:200]) from error
        except (httpx2.HTTPError, ValueError) as error:
            raise _away(error) from error
        return token

    def _verified(self, token: dict[str, Any], nonce: str) -> CodeIDToken:
        """The ID token's claims, once signature, issuer, audience, times and nonce have been checked."""
        try:
            decoded = self._decoded(str(token["id_token"]))
            claims = CodeIDToken(
                decoded.claims,
                decoded.header,
                {
                    "iss": {"essential": True, "value": self._settings.oidc_issuer},
                    "aud": {"essential": True, "value": self._settings.oidc_client_id},
                },
                {
                    "nonce": nonce,
                    "client_id": self._settings.oidc_client_id,
                    "access_token": token.get("access_token"),
                },
            )
            claims.validate(leeway=LEEWAY_SECONDS)
        except (JoseError, KeyError, ValueError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"[:200]
            raise _refusal("your provider's answer cannot be trusted", why) from error
        return claims

    def _decoded(self, id_token: str) -> jwt.Token:
        registry = JWSRegistry(algorithms=list(ALGORITHMS), strict_check_header=False)
        known = self._published()
        try:
            return jwt.decode(id_token, known.keys, registry=registry)
        except (JoseError, ValueError):
            fresh = self._published(max_age=KEYS_SECONDS)  # the provider may have changed its keys
            if fresh is known:
                raise
            return jwt.decode(id_token, fresh.keys, registry=registry)

    def _vouched(self, claims: CodeIDToken) -> Vouched:
        email, name, verified = (claims.get(key) for key in ("email", "name", "email_verified"))
        subject = claims.get("sub")
        if not isinstance(subject, str) or not 1 <= len(subject) <= 255:
            raise _refusal("your provider's answer cannot be trusted", "sub")
        return Vouched(
            issuer=self._settings.oidc_issuer,
            subject=subject,
            email=_address(email) if isinstance(email, str) else "",
            # Some providers send the text "true"; nothing else counts.
            email_verified=verified is True or verified == "true",
            name=name if isinstance(name, str) else "",
        )

    # --- what it publishes --------------------------------------------------------------------------------

    def _published(self, max_age: float = METADATA_SECONDS) -> _Known:
        with self._lock:
            known = self._known
            if known is None or time.monotonic() - known.at > max_age:
                known = self._known = self._fetch()
            return known

    def _fetch(self) -> _Known:
        issuer = self._settings.oidc_issuer
        try:
            with httpx2.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False) as http:
                metadata = _json(http, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
                if metadata.get("issuer") != issuer:
                    raise ValueError(f"its metadata says it is {str(metadata.get('issuer'))[:200]!r}")
                keys = KeySet.import_key_set(_json(http, _endpoint(metadata, "jwks_uri")))  # type: ignore[arg-type]
        except (httpx2.HTTPError, JoseError, ValueError, TypeError, KeyError) as error:
            raise _away(error) from error
        return _Known(metadata, keys, time.monotonic())

    # --- the attempt in the browser -----------------------------------------------------------------------

    def _seal(self, attempt: Attempt) -> str:
        body = base64.urlsafe_b64encode(json.dumps([int(time.time()), *attempt]).encode()).decode()
        return f"{body}.{self._signature(body)}"

    def _open(self, sealed: str | None) -> Attempt:
        body, _, signature = (sealed or "").partition(".")
        if not sealed or not hmac.compare_digest(signature.encode(), self._signature(body).encode()):
            raise _refusal("this browser has not begun to sign in, or took too long", "cookie")
        began, *parts = json.loads(base64.urlsafe_b64decode(body))
        if not 0 <= time.time() - began <= ATTEMPT_SECONDS:
            raise _refusal("this browser has not begun to sign in, or took too long", "cookie")
        return Attempt(*parts)

    def _signature(self, body: str) -> str:
        return hmac.digest(self._pepper, b"oidc:" + body.encode(errors="surrogatepass"), "sha256").hex()


def _endpoint(metadata: dict[str, Any], name: str) -> str:
    """An address of the provider's, encrypted unless it is this machine's. Raises ValueError."""
    url = metadata.get(name)
    place = urlsplit(url) if isinstance(url, str) else urlsplit("")
    if place.scheme != "https" and not (place.scheme == "http" and place.hostname in ("127.0.0.1", "::1", "localhost")):
        raise _away(ValueError(f"its {name} is no https address"))
    return str(url)


def _address(email: str) -> str:
    """As addresses are kept, or nothing where lowering the case would turn a foreign letter into an ASCII one: the
    Kelvin sign becomes a k, and with it one person's address another's."""
    folds = any(not one.isascii() and one.lower().isascii() for one in email)
    return "" if folds else email.strip().lower()


def _json(http: httpx2.Client, url: str) -> dict[str, Any]:
    with http.stream("GET", url, headers={"accept": "application/json"}) as response:
        response.raise_for_status()
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > LARGEST_ANSWER:
                raise ValueError(f"{url} answers with more than {LARGEST_ANSWER} bytes")
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError(f"{url} is no JSON object")  # noqa: TRY004 - what a server sent
    return found


def _refusal(sentence: str, why: str) -> Unauthenticated:
    """People read a sentence; the log says which check failed."""
    log.warning("oidc_refused", why=why)
    return Unauthenticated(f"{sentence}; start again", code="oidc_refused")


def _away(error: Exception) -> Unavailable:
    log.warning("oidc_provider_away", error=str(error)[:300])
    return Unavailable("your sign-in provider does not answer properly; try again, or use a sign-in link")
