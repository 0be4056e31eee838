"""A small OpenID Connect provider on loopback that signs real tokens, and lies in every way a test asks it to."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey

CLIENT_ID, CLIENT_SECRET = "whet-console", "a client secret for tests"


@dataclass
class Provider:
    """What it says and how it lies. `claims` are laid over the true ones, None leaves one out."""

    issuer: str = ""
    person: dict[str, Any] = field(default_factory=lambda: {"sub": "ada-1", "email": "ada@example.org",
                                                            "email_verified": True, "name": "Ada"})  # fmt: skip
    claims: dict[str, Any] = field(default_factory=dict)
    sign: Callable[[dict[str, Any], RSAKey], str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "one"}))
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def authorize(self, url: str) -> dict[str, str]:
        """What a browser at the authorization endpoint is sent back with: the person signs in at once."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        assert asked["response_type"] == "code"
        assert asked["client_id"] == CLIENT_ID
        assert asked["code_challenge_method"] == "S256"
        assert "openid" in asked["scope"].split()
        code = f"code-{len(self.codes)}"
        self.codes[code] = asked
        return {"code": code, "state": asked["state"]}

    def token(self, form: dict[str, str], authorization: str) -> dict[str, Any] | None:
        """The token endpoint; None refuses."""
        asked = self.codes.pop(form.get("code", ""), None)
        secret = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        challenge = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        wrong = [
            name
            for name, right in (
                ("code", asked is not None),
                ("client", authorization == f"Basic {secret}"),
                ("pkce", asked and base64.urlsafe_b64encode(challenge).decode().rstrip("=") == asked["code_challenge"]),
                ("redirect_uri", asked and form.get("redirect_uri") == asked["redirect_uri"]),
            )
            if not right
        ]
        self.refused += wrong
        if wrong or asked is None:
            return None
        now = int(time.time())
        true = {"iss": self.issuer, "aud": CLIENT_ID, "iat": now, "exp": now + 300, "nonce": asked["nonce"]}
        said = {name: value for name, value in (true | self.person | self.claims).items() if value is not None}
        signed = (self.sign or honestly)(said, self.key)
        return {"access_token": "an access token", "token_type": "Bearer", "expires_in": 300, "id_token": signed}


def honestly(claims: dict[str, Any], key: RSAKey) -> str:
    return jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)


def unsigned(claims: dict[str, Any], key: RSAKey) -> str:
    """`alg` none, and no signature."""
    parts = [json.dumps(part).encode() for part in ({"alg": "none", "kid": key.kid}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."


def with_the_secret(claims: dict[str, Any], _key: RSAKey) -> str:
    """HS256 under the client secret, as somebody who stole it might."""
    return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(CLIENT_SECRET))


def by_a_stranger(claims: dict[str, Any], key: RSAKey) -> str:
    """A key of the right name that is not the provider's."""
    return honestly(claims, RSAKey.generate_key(2048, {"kid": key.kid}))


def tampered(claims: dict[str, Any], key: RSAKey) -> str:
    """Honestly signed, then changed."""
    head, body, signature = honestly(claims, key).split(".")
    changed = json.loads(base64.urlsafe_b64decode(body + "==")) | {"email": "boss@example.org"}
    return ".".join((head, base64.urlsafe_b64encode(json.dumps(changed).encode()).decode().rstrip("="), signature))


@contextmanager
def serving() -> Iterator[Provider]:
    """The provider on a free port."""
    provider = Provider()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/.well-known/openid-configuration":
                true = {"issuer": provider.issuer} | {
                    name: f"{provider.issuer}/{path}"
                    for name, path in (("authorization_endpoint", "authorize"), ("token_endpoint", "token"),
                                       ("jwks_uri", "keys"))
                }  # fmt: skip
                self._say(200, true | provider.metadata)
            else:
                self._say(200, {"keys": [provider.key.as_dict(private=False)]})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"])).decode()
            form = {name: values[0] for name, values in parse_qs(raw).items()}
            token = provider.token(form, self.headers.get("authorization", ""))
            self._say(200 if token else 400, token or {"error": "invalid_grant"})

        def _say(self, status: int, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        provider.issuer = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield provider
        finally:
            server.shutdown()
            thread.join()
