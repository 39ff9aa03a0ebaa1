"""An explanation in three sentences."""

from __future__ import annotations

from tl_nodeprune.evidence.explanations.explanation import LEADS, STANDS_OUT, WHOLE_TASK, Explanation, NodeRole, listed, share
from tl_nodeprune.nodes import figures

_NAMED = 4  # nodes that a sentence names one by one


def sentences_of(found: Explanation) -> tuple[str, str, str]:
    """What the circuit does as a whole and by which nodes; what the strongest of them does; what it reads and where its work goes."""
    named = [node for node in found.nodes if node.stands_out] if does_the_task(found) else []
    if not named:
        nothing = "So the numbers below say little about a single node: read them as a list of what was tried, not as a finding."
        return _whole(found), _nothing(found), nothing
    return f"{_whole(found)[:-1]}, and {_carried(found, named)}.", _strongest(found, named[0]), _fed(found, named[0])


def does_the_task(found: Explanation) -> bool:
    """Whether the circuit keeps half or more of what separates the full model from the ablated one."""
    span = found.full.logit_diff - found.ablated.logit_diff
    return abs(span) > 1e-6 and (found.circuit.logit_diff - found.ablated.logit_diff) / span >= WHOLE_TASK


def _whole(found: Explanation) -> str:
    prompts = f"{found.n_prompts:,} prompts" if found.n_prompts != 1 else "one prompt"
    return (f"On {prompts} the circuit's logit difference, answer minus wrong answer, is {figures(found.circuit.logit_diff)} (full model "
            f"{figures(found.full.logit_diff)}; with all of its nodes cut {figures(found.ablated.logit_diff)}).")


def _carried(found: Explanation, named: list[NodeRole]) -> str:
    n, rest = len(found.effects), found.effects["effect"].abs().iloc[len(named):]
    some = [f"{changes(node.effect, f'cutting {node.name}')}" for node in named[:_NAMED]]
    count = f"{_number(len(named))} of {n} kept heads and blocks stand" + "s" * (len(named) == 1)
    more = f"; {_number(len(named) - _NAMED)} more less so" if len(named) > _NAMED else ""
    left = f", and each other one changes it by {figures(float(rest.max()))} at most" if len(rest) else ""
    return f"{count} out: {'; '.join(some)}{more}{left}"


def _nothing(found: Explanation) -> str:
    most = float(found.effects["effect"].abs().max())
    span = abs(found.full.logit_diff - found.ablated.logit_diff)
    if not does_the_task(found):
        return ("That is less than half of what separates the full model from the ablated one, so the circuit does not do the task here, "
                f"and no node stands out as a part of it (the largest effect of one is {figures(most)}).")
    return (f"No node stands out: cutting any one of its {len(found.effects)} heads and blocks changes that by {figures(most)} at most; to "
            f"be named, a node must change it by {figures(STANDS_OUT * span)}, and surely so.")


def _strongest(found: Explanation, node: NodeRole) -> str:
    parts = []
    if roles := node.attention():
        words = (" of its attention", " were it spread evenly"), ("", "")
        shares = [f"{role} ({part:.0%}{words[i > 0][0]}, {even:.0%}{words[i > 0][1]})" for i, (role, part, even) in enumerate(roles)]
        parts.append(f"attends from the answer position to {listed(shares)}")
    if node.neurons:
        parts.append(f"works most through its neurons {listed([str(neuron) for neuron in node.neurons])}")
    if node.promotes:
        parts.append(f"by itself {_aim(node)}: its output adds {figures(node.to_answer, sign=True)} to the logit of the answer and "
                     f"{figures(node.to_wrong, sign=True)} to that of the wrong answer"
                     + (f", {part} of the circuit's logit difference" if (part := share(node.direct, found.circuit.logit_diff)) else ""))
    if not parts:
        return f"What {node.name} attends to or writes cannot be shown in this model."
    return f"{_capital(node.name)} {' and '.join(parts)}."


def _fed(found: Explanation, node: NodeRole) -> str:
    span = abs(found.full.logit_diff - found.ablated.logit_diff)
    strong = found.edges[found.edges["effect"].abs() >= LEADS * span]
    into = [f"{row.sender} ({figures(row.effect, sign=True)})" for row in strong[strong["receiver"] == node.name].head(3).itertuples()]
    out = [f"{row.receiver} ({figures(row.effect, sign=True)})" for row in strong[strong["sender"] == node.name].head(3).itertuples()]
    if not into and not out:
        return f"No path into or out of {node.name} among the nodes below changes the logit difference by {figures(LEADS * span)} or more."
    read = f"It reads {listed(into)}" if into else "None of the nodes below feeds it strongly"
    goes = f"its output works through {listed(out)}" if out else "no single path out of it is strong"
    return f"{read}; {goes}: in brackets, what cutting that one path changes in the logit difference."


def changes(effect: float, what: str) -> str:
    """As "cutting head 4.4 lowers it by 11.0"."""
    return f"{what} {'lowers' if effect < 0 else 'raises'} it by {figures(abs(effect))}"


def _aim(node: NodeRole) -> str:
    """Which of the two logits it changes more, and how."""
    change, which = max((node.to_answer, "answer"), (node.to_wrong, "wrong answer"), key=lambda pair: abs(pair[0]))
    return f"mostly {'raises' if change > 0 else 'lowers'} the {which}'s logit"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _number(n: int) -> str:
    return {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}.get(n, f"{n:,}")
