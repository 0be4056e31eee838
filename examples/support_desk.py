"""A small support desk: asks through the `openai` client, and says through the `whet` one what should have been said.

    WHET_API_KEY=wh_… python -m examples.support_desk "May I return a lamp after 40 days?"
    WHET_API_KEY=wh_… python -m examples.support_desk "…" --correction "No: policy 12 gives you 30 days."

The key needs the scopes infer and feedback. WHET_GATEWAY names another gateway than this machine's.
"""

import argparse
import os
import sys

from openai import OpenAI, OpenAIError

from whet_client.client import GATEWAY_URL, Whet
from whet_client.errors import WhetError


def main() -> None:
    """Ask, print the answer, and send a thumb with what the customer's agent typed."""
    wanted = _arguments()
    gateway, key = os.environ.get("WHET_GATEWAY", GATEWAY_URL), os.environ.get("WHET_API_KEY", "")
    if not key:
        sys.exit("set WHET_API_KEY to a key with the scopes infer and feedback")
    try:
        desk = OpenAI(base_url=f"{gateway}/v1", api_key=key)
        answer = desk.chat.completions.create(
            model=wanted.project, messages=[{"role": "user", "content": wanted.question}], temperature=0, max_tokens=120
        )
        print(answer.choices[0].message.content)
        with Whet(key, project=wanted.project, gateway_url=gateway) as whet:
            rating = -1 if wanted.correction else 1
            stored = whet.feedback(answer.id, rating=rating, correction=wanted.correction, user=wanted.agent)
    except (OpenAIError, WhetError) as error:
        sys.exit(f"the desk could not do that: {error}")
    print(f"thumbs {'down, with the correction' if wanted.correction else 'up'}: feedback {stored.id}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask the support desk, and correct it.")
    parser.add_argument("question")
    parser.add_argument("--correction", help="what the answer should have been")
    parser.add_argument("--project", default="chat", help="a project's slug")
    parser.add_argument("--agent", default="desk", help="who says so")
    return parser.parse_args()


if __name__ == "__main__":
    main()
