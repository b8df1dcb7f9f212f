"""A small synthetic language: messages to a shop's support desk, and the replies of its agents.

A ``Ticket`` (customer, product, intent) is drawn first; a grammar with several phrasings per
statement turns it into text. The meaning of every text is therefore known, and labelled data for
any task can be generated without annotators. The base model is trained on ``document``: dialogues,
order entries, handbook sentences, and a few examples of the labelled tasks, of half of the intents.
So it can do a part of the tasks, as real base models can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Final, Literal

Intent = Literal[
    "refund", "delivery", "damage", "billing", "account", "cancel", "question", "praise"
]

NAMES: Final = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jonas",
    "Karin", "Lucas", "Maria", "Nadia", "Oscar", "Paula", "Ralph", "Sofia", "Thomas", "Vera",
)  # fmt: skip
PRODUCTS: Final = (
    "kettle", "lamp", "blender", "toaster", "camera", "bicycle", "tent", "backpack", "keyboard",
    "monitor", "printer", "speaker", "phone", "tablet", "watch", "mirror", "carpet", "sofa",
    "table", "heater", "fan", "vacuum cleaner", "coffee machine", "desk chair",
)  # fmt: skip
COLOURS: Final = ("red", "blue", "green", "black", "white", "grey", "yellow", "brown")
DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
PEOPLE: Final = ("my sister", "my father", "my office", "our kitchen", "a friend", "my son")
ROOMS: Final = ("the kitchen", "the garden", "a small room", "the office", "long trips", "children")

COMPLAINTS: Final[dict[Intent, tuple[str, ...]]] = {
    "refund": (
        "I want my money back for the {p}",
        "the {p} is not what I expected and I would like to return it",
        "please pay back what I spent on the {p}",
        "I sent the {p} back last {d} and have not got my money",
        "how do I return the {p} for the full price",
        "the {p} does not suit {w}, so I would like a refund",
    ),
    "delivery": (
        "my {p} has not arrived yet",
        "where is the {p} that I ordered on {d}",
        "the parcel with the {p} should have been here on {d}",
        "I am still waiting for the {p}",
        "the courier did not bring the {p} on {d}",
        "the tracking page of the {p} has not changed since {d}",
    ),
    "damage": (
        "the {p} came with a crack in it",
        "the {p} stopped working on {d}",
        "one part of the {p} is broken",
        "there is a deep scratch on the {p}",
        "the {p} makes a strange noise and then switches off",
        "when I opened the box, the {p} was in pieces",
    ),
    "billing": (
        "I was charged twice for the {p}",
        "the invoice of the {p} shows the wrong price",
        "my card was debited again for the {p} on {d}",
        "you took more for the {p} than the page said",
        "the bill of the {p} has a fee that I do not know",
        "I need a corrected invoice for the {p}",
    ),
    "account": (
        "I cannot log in to see the order of my {p}",
        "the password is refused when I want to order a {p}",
        "my account was locked on {d} while I bought the {p}",
        "I want to change my e-mail address before I order the {p}",
        "the site signs me out whenever I put the {p} into the basket",
        "the login code for the order of the {p} never comes",
    ),
    "cancel": (
        "please cancel the order of the {p}",
        "I ordered the {p} by mistake, please stop it",
        "I do not need the {p} any more, do not send it",
        "can I still withdraw the order of the {p} from {d}",
        "I changed my mind about the {p} before it was sent",
        "take the {p} out of my order",
    ),
    "question": (
        "does the {p} also come in {c}",
        "is the {p} good for {r}",
        "how heavy is the {p}",
        "how long is the warranty of the {p}",
        "can the {p} be used in {r}",
        "which size does the {c} {p} have",
    ),
    "praise": (
        "the {p} is wonderful",
        "I am very happy with the {p}",
        "the {p} works even better than I hoped",
        "everybody at home loves the {c} {p}",
        "thank you for the quick help with my {p}",
        "it was a pleasure to buy the {p} from you",
    ),
}
REPLIES: Final[dict[Intent, tuple[str, ...]]] = {
    "refund": ("we will send your money back.", "you will be paid back this week."),
    "delivery": ("we will find out where your parcel is.", "your parcel is on its way to you."),
    "damage": ("we will repair it or send a new one.", "a replacement will be sent to you."),
    "billing": ("we will correct the bill.", "the wrong charge will be undone."),
    "account": ("we will open your account again.", "a new login is coming by e-mail."),
    "cancel": ("your order is stopped.", "nothing will be sent to you."),
    "question": ("here is what we know about it.", "we will look this up for you."),
    "praise": ("it is good to hear that you like it.", "thank you for the kind words."),
}
NOTES: Final[dict[Intent, str]] = {
    "refund": "wants to give the goods back and get the money returned",
    "delivery": "is waiting for a parcel that is late",
    "damage": "got goods that are broken and need a repair",
    "billing": "has paid too much and needs a new invoice",
    "account": "has no access to the account",
    "cancel": "wants to stop an order before it is sent",
    "question": "would like to know more before buying",
    "praise": "says thanks and is happy with us",
}
TAUGHT: Final[tuple[Intent, ...]] = ("refund", "delivery", "damage", "billing")
"""Intents whose labels and notes the base model has seen."""
HANDBOOK: Final = (
    "The {i} desk helps a customer who {t}.",
    "A customer who {t} is a matter for {i}.",
    "{i}: a customer {t}.",
    "Letters about {i} come from a customer who {t}.",
)
GREETINGS: Final = ("Hello", "Good morning", "Dear team", "Hi there", "Good evening")
ASIDES: Final = (
    "It was a present for {w}.",
    "I bought it on {d}.",
    "I have been a customer for years.",
    "The {c} one looked best to me.",
    "I saw it in your shop on {d}.",
    "We wanted it for {w}.",
    "It is meant for {r}.",
    "This is my first order.",
)
ORDERS: Final = (
    "{n} ordered a {c} {p} on {d}.",
    "On {d} {n} bought the {c} {p}.",
    "A {c} {p} was sent to {n} on {d}.",
    "The {c} {p} that came on {d} is for {n}.",
)
BOOKINGS: Final = (
    "{n}, {p}, {c}, {d}",
    "{p} for {n}, {c}, {d}",
    "{d}: {c} {p}, {n}",
)


@dataclass(frozen=True)
class Ticket:
    """Customer, product and intent of a message."""

    name: str
    product: str
    intent: Intent


def draw_ticket(random: Random) -> Ticket:
    return Ticket(random.choice(NAMES), random.choice(PRODUCTS), random.choice(tuple(COMPLAINTS)))


def message(ticket: Ticket, random: Random) -> str:
    """Return a customer's message: greeting, complaint and asides, with the name first or last."""
    words = _words(random) | {"p": ticket.product, "n": ticket.name}
    matter = _sentence(random.choice(COMPLAINTS[ticket.intent]).format(**words))
    asides = [text.format(**words) for text in random.sample(ASIDES, random.choice((0, 1, 1, 2)))]
    place = random.randint(0, len(asides))
    body = " ".join([*asides[:place], matter, *asides[place:]])
    greeting = random.choice(GREETINGS)
    if random.random() < 0.5:
        return f"{greeting}, this is {ticket.name}. {body}"
    return f"{greeting}. {body} Regards, {ticket.name}"


def reply(ticket: Ticket, random: Random) -> str:
    """Return the agent's reply, which names the customer and follows from the intent."""
    return f"Dear {ticket.name}, {random.choice(REPLIES[ticket.intent])}"


def note(ticket: Ticket) -> str:
    """Return the desk's note on a message: the target of the ``note`` task."""
    return f"The customer {NOTES[ticket.intent]}."


def document(random: Random) -> tuple[str, str | None]:
    """Return one pre-training document, and the customer's message in it (if any).

    54 % are dialogues, and 12 % examples of the labelled tasks. The others are order sentences with
    their entries, and sentences of the desk's handbook, from which the model learns the vocabulary
    of the tasks' answers.
    """
    kind = random.random()
    if kind < 0.12:
        ticket = replace(draw_ticket(random), intent=random.choice(TAUGHT))
        asked = message(ticket, random)
        answer = f"Label: {ticket.intent}" if kind < 0.06 else f"Note: {note(ticket)}"
        return f"{asked}\n{answer}", asked
    if kind < 0.66:
        ticket = draw_ticket(random)
        asked = message(ticket, random)
        return f"Customer: {asked}\nAgent: {reply(ticket, random)}", asked
    lines = []
    for _ in range(2):
        if kind < 0.8:
            words = _words(random) | {"n": random.choice(NAMES), "p": random.choice(PRODUCTS)}
            order, booking = random.choice(ORDERS), random.choice(BOOKINGS)
            lines.append(f"Order: {order.format(**words)}\nEntry: {booking.format(**words)}")
        else:
            intent = random.choice(tuple(NOTES))
            lines.append(random.choice(HANDBOOK).format(i=intent, t=NOTES[intent]))
    return "\n".join(lines), None


def _words(random: Random) -> dict[str, str]:
    first, second = random.sample(COLOURS, 2)
    return {
        "d": random.choice(DAYS),
        "w": random.choice(PEOPLE),
        "r": random.choice(ROOMS),
        "c": first,
        "e": second,
    }


def _sentence(text: str) -> str:
    asks = text.split(" ", 1)[0] in {"where", "how", "does", "is", "can", "which"}
    return text[0].upper() + text[1:] + ("?" if asks else ".")
