// Talking to the review endpoints. `Offline` means nothing is known about what the server did: ask again with the
// same idempotency key.

export class Offline extends Error {}

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? "";
  }
}

export class Transport {
  constructor(slug) {
    this.base = `/p/${slug}/review`;
  }

  // Those held already count: five of them wait here, or more after undoing.
  lease(queue, held) {
    return this.#ask("POST", "/lease", { count: Math.min(20, Math.max(5, held)), queue });
  }

  annotate(itemId, body) {
    return this.#ask("POST", `/items/${itemId}/annotations`, body);
  }

  undo(annotationId) {
    return this.#ask("POST", "/undo", { annotation_id: annotationId });
  }

  markGold(itemId) {
    return this.#ask("POST", `/items/${itemId}/gold`);
  }

  chooseKeys(keys) {
    return this.#ask("PUT", "/keys", { keys });
  }

  progress() {
    return this.#ask("GET", "/progress");
  }

  history() {
    return this.#ask("GET", "/history");
  }

  async #ask(method, path, body) {
    let response;
    try {
      response = await fetch(this.base + path, {
        method,
        headers: { "content-type": "application/json", accept: "application/json" },
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: AbortSignal.timeout(15000),
      });
    } catch {
      throw new Offline("the console cannot be reached");
    }
    if (response.status >= 500) throw new Offline(`the console answered ${response.status}`);
    const answer = await response.json().catch(() => null);
    if (!response.ok) throw new Refused(response.status, answer?.error);
    return answer;
  }
}
