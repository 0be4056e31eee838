"""A small support desk: asks through the `openai` client, and says through the `whet` one what an answer was worth.

    python -m examples.support_desk --key wh_…
    python -m examples.support_desk --key wh_… "May I return a lamp after 40 days?" --correction "No: 30 days."

Without a question it goes on asking until an empty line. The key, which DESK_KEY may hold instead, needs the scopes
infer and feedback. Only what somebody says about an answer is sent: silence is no praise.
"""

import argparse
import os
import sys

from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionMessageParam

from whet_client.client import GATEWAY_URL, Whet
from whet_client.errors import WhetError

ASK = "Good answer? Enter says nothing, + is good, - is bad, or type what it should have said: "


class Desk:
    """One agent's desk, on one project."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.project, self.agent = wanted.project, wanted.agent
        self.model = OpenAI(base_url=f"{wanted.gateway}/v1", api_key=wanted.key)
        self.whet = Whet(wanted.key, project=wanted.project, gateway_url=wanted.gateway)

    def answer(self, question: str) -> str:
        """Print an answer while it comes, and return its id."""
        identity = ""
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
        for part in self.model.chat.completions.create(
            model=self.project, messages=messages, temperature=0, max_tokens=120, stream=True, user=self.agent
        ):
            identity = part.id
            print(part.choices[0].delta.content or "" if part.choices else "", end="", flush=True)
        print()
        return identity

    def tell(self, interaction_id: str, opinion: str) -> None:
        """Say what an answer was worth: "+", "-", or a better answer."""
        correction = None if opinion in ("+", "-") else opinion
        rating = 1 if opinion == "+" else -1
        stored = self.whet.feedback(interaction_id, rating=rating, correction=correction, user=self.agent)
        said = "good" if rating > 0 else "bad, with a correction" if correction else "bad"
        print(f"told Whet that it was {said} ({stored.id})")


def main() -> None:
    """One question from the command line, or a conversation with whoever sits at the desk."""
    wanted = _arguments()
    try:
        desk = Desk(wanted)
        if wanted.question:
            identity = desk.answer(wanted.question)
            if wanted.correction:
                desk.tell(identity, wanted.correction)
            return
        while question := input("Question: ").strip():
            identity = desk.answer(question)
            if opinion := input(ASK).strip():
                desk.tell(identity, opinion)
    except (OpenAIError, WhetError, ValueError) as error:
        sys.exit(f"the desk could not do that: {error}")
    except (EOFError, KeyboardInterrupt):
        print()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask the support desk, and correct it.")
    parser.add_argument("question", nargs="?", help="ask this and end; without it, ask for questions")
    parser.add_argument("--correction", help="what the answer should have been")
    parser.add_argument("--key", default=os.environ.get("DESK_KEY", ""), help="an API key; or set DESK_KEY")
    parser.add_argument("--project", default="chat", help="a project's slug")
    parser.add_argument("--agent", default="desk", help="who sits here")
    parser.add_argument("--gateway", default=GATEWAY_URL, help="the gateway's address")
    return parser.parse_args()


if __name__ == "__main__":
    main()
