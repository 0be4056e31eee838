"""Settings: read once from the environment, typed, immutable. README lists them; a test keeps the list true."""

import os
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PLACEHOLDERS = {"changeme", "change-me", "secret", "password", "placeholder", "default"}


def default_home() -> Path:
    """Root cannot run Postgres from its own home, so it gets the service directory."""
    return Path("/var/lib/whet/home") if os.geteuid() == 0 else Path.home() / ".whet"


class Settings(BaseSettings):
    """Every setting is `WHET_<NAME>`, except `DATABASE_URL` and `REDIS_URL`, which replace the embedded servers."""

    model_config = SettingsConfigDict(env_prefix="WHET_", frozen=True, extra="forbid")

    home: Path = Field(default_factory=default_home, description="Data directory: database, artefacts, spool, secrets.")
    run_dir: Path | None = Field(None, description="Private directory for sockets; short, because paths are limited.")
    database_url: str = Field(
        "", validation_alias="DATABASE_URL", description="Use this Postgres, not the embedded one."
    )
    redis_url: str = Field("", validation_alias="REDIS_URL", description="Use this Redis, not the embedded one.")
    host: str = Field("127.0.0.1", description="Address the gateway and the console listen on.")
    gateway_port: int = Field(8000, ge=0, le=65535, description="Port of the OpenAI-compatible API.")
    console_port: int = Field(8001, ge=0, le=65535, description="Port of the console and the admin API.")
    public_console_url: str = Field("", description="How browsers reach the console, when behind a proxy.")
    model: str = Field("starter", description="`starter`, a directory, or a Hugging Face model id.")
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto", description="Weights and compute type of the engine; int8 keeps weights in 8 bits (CPU only)."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the engine runs.")
    engine_threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 chooses by model size.")
    kv_tokens: int = Field(32768, ge=256, description="Tokens the KV cache holds.")
    max_context: int = Field(0, ge=0, description="Longest prompt plus completion; 0 takes the model's own.")
    max_running: int = Field(64, ge=1, description="Sequences in one step.")
    step_tokens: int = Field(512, ge=16, description="Token budget of one step.")
    trainer: bool = Field(
        True, description="Whether `whet up` trains here; off: `whet worker --queue train` on another machine does."
    )
    adapter_slots: int = Field(8, ge=2, description="LoRA adapters held at once, one spare for swaps included.")
    adapter_rank: int = Field(32, ge=1, description="Largest LoRA rank a slot holds.")
    engines: str = Field("", description="More engines on this machine to keep loaded: addresses, by commas.")
    speculation: bool = Field(True, description="Whether the engine drafts tokens; off, every step yields one.")
    speculator_slots: int = Field(4, ge=1, description="Trained speculators held at once.")
    speculator_heads: int = Field(8, ge=1, description="Most heads a speculator may have.")
    speculator_vocabulary: int = Field(4096, ge=16, description="Most token ids that heads may draft.")
    suffix_tokens: int = Field(1 << 20, ge=1024, description="Past response tokens a project drafts from.")
    max_body_bytes: int = Field(4_000_000, ge=1000, le=32 * 2**20, description="Largest request body.")
    durability: Literal["process", "power"] = Field("process", description="What a logged answer survives.")
    spool_bytes: int = Field(2_000_000_000, ge=1_000_000, description="Disk budget of the log spool; full answers 503.")
    secret: str = Field(
        "", description="Pepper for API keys and sessions (32+ characters); empty makes one in the home."
    )
    oidc_issuer: str = Field("", description="OpenID Connect provider people may sign in with; empty: links only.")
    oidc_client_id: str = Field("", description="What the provider calls this console.")
    oidc_client_secret: str = Field("", description="Secret of that client; empty for a public one (PKCE alone).")
    oidc_name: str = Field("OpenID Connect", max_length=60, description="What the sign-in button calls the provider.")
    oidc_domains: str = Field("", description="E-mail domains that need no invitation, separated by commas.")
    oidc_role: Literal["", "viewer", "reviewer"] = Field(
        "", description="Role on every project for people of those domains; empty: none until somebody gives one."
    )
    webhook_private_targets: bool = Field(
        False, description="Whether webhooks may reach private addresses, and this machine by plain http."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much the processes say.")

    @field_validator("secret")
    @classmethod
    def _refuse_weak_secret(cls, value: str) -> str:
        if value and (value.lower() in PLACEHOLDERS or len(value) < 32):
            raise ValueError(
                "WHET_SECRET is a placeholder or shorter than 32 characters; unset it or give a random one"
            )
        return value

    @field_validator("oidc_issuer")
    @classmethod
    def _refuse_plain_http(cls, value: str) -> str:
        """Whoever can read or change the traffic with the provider can be anybody."""
        place = urlsplit(value)
        local = place.scheme == "http" and place.hostname in ("127.0.0.1", "::1", "localhost")
        if value and not (local or (place.scheme == "https" and place.hostname)):
            raise ValueError("WHET_OIDC_ISSUER must be an https:// address (http only on this machine itself)")
        return value

    @model_validator(mode="after")
    def _refuse_half_a_provider(self) -> "Settings":
        if bool(self.oidc_issuer) != bool(self.oidc_client_id):
            raise ValueError("WHET_OIDC_ISSUER and WHET_OIDC_CLIENT_ID go together: set both or neither")
        return self

    @field_validator("home", mode="after")
    @classmethod
    def _absolute_home(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: dict[str, object]) -> dict[str, object]:
        known = {f"WHET_{name.upper()}" for name in cls.model_fields} | {"WHET_FAILPOINT", "WHET_URL", "WHET_API_KEY"}
        unknown = sorted(key for key in os.environ if key.startswith("WHET_") and key not in known)
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown)}: see the settings table in README.md")
        return values

    @cached_property
    def sockets(self) -> Path:
        """The private run directory. Unix socket paths are limited to about 107 bytes, so it must be short."""
        return self.run_dir or self.home / "run"

    @property
    def model_path(self) -> Path:
        """Directory of the model's weights and tokenizer. Raises ValueError when there is none on this machine."""
        if self.model == "starter":
            return Path(__file__).parents[1] / "engine" / "starter"
        if Path(self.model).expanduser().is_dir():
            return Path(self.model).expanduser().absolute()
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.model, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            raise ValueError(
                f"the model {self.model!r} is neither `starter`, nor a directory, nor a downloaded Hugging Face model"
            ) from None

    @property
    def gateway_url(self) -> str:
        """How this machine reaches the gateway."""
        return f"http://{self._reachable_host}:{self.gateway_port}"

    @property
    def console_url(self) -> str:
        """How browsers and the CLI reach the console."""
        return self.public_console_url.rstrip("/") or f"http://{self._reachable_host}:{self.console_port}"

    @property
    def _reachable_host(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @property
    def oidc_domain_list(self) -> tuple[str, ...]:
        """The allow-listed domains, as addresses end."""
        parts = (part.strip().lower().removeprefix("@") for part in self.oidc_domains.split(","))
        return tuple(part for part in parts if part)

    @property
    def engine_socket(self) -> str:
        """ZeroMQ address of the engine."""
        return f"ipc://{self.sockets / 'engine.sock'}"

    @property
    def engine_sockets(self) -> tuple[str, ...]:
        """Every engine that this machine's dispatcher keeps loaded with what is deployed, its own first."""
        more = (address.strip() for address in self.engines.split(","))
        return tuple(dict.fromkeys((self.engine_socket, *(address for address in more if address))))

    @property
    def artifacts(self) -> Path:
        """Artefact directories, one per digest."""
        return self.home / "artifacts"

    @property
    def spool(self) -> Path:
        """Log segments written by gateways, read by the shipper."""
        return self.home / "spool"

    @property
    def redis_dsn(self) -> str:
        """The broker URL as Celery wants it."""
        return self.redis_url or f"redis+socket://{self.sockets / 'redis.sock'}?virtual_host=0"

    @property
    def database_dsn(self) -> str:
        """SQLAlchemy URL on psycopg 3."""
        if self.database_url:
            head, _, rest = self.database_url.partition("://")
            if head.split("+")[0] not in {"postgres", "postgresql"}:
                raise ValueError("DATABASE_URL must start with postgresql://")
            return f"postgresql+psycopg://{rest}"
        return f"postgresql+psycopg://whet@/whet?host={self.sockets}"
