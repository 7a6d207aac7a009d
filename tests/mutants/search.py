"""Deliberate breakages of the searches: (file, old text, new text, the pytest selection that must fail)."""

ALGORITHMS = "tests/test_search_algorithms.py"
LANDSCAPES = "tests/test_search_landscapes.py"

MUTANTS = [
    (  # the less a child was visited, the worse
        "drllm_fast/search/mcts.py",
        "mean * child.visits / count + explore",
        "mean * child.visits / count - explore",
        f"{ALGORITHMS} -k 'ucb or diverse'",
    ),
    (  # longer paths are better
        "drllm_fast/search/mcts.py",
        "explore - self._penalty(child.length)",
        "explore + self._penalty(child.length)",
        f"{ALGORITHMS} -k ucb",
    ),
    (  # the worst child is taken
        "drllm_fast/search/mcts.py",
        "ways[scores.index(max(scores))]",
        "ways[scores.index(min(scores))]",
        f"{ALGORITHMS} -k 'better_half'",
    ),
    (  # only leaves expand
        "drllm_fast/search/mcts.py",
        "(not ways or len(node.children) < self._width(node))",
        "not ways",
        f"{ALGORITHMS} -k 'branches or widening'",
    ),
    (  # all edits of a node before any below it
        "drllm_fast/search/mcts.py",
        "(not ways or len(node.children) < self._width(node))",
        "True",
        f"{ALGORITHMS} -k 'branches or widening'",
    ),
    (  # no virtual loss
        "drllm_fast/search/mcts.py",
        "count = child.visits + child.waiting",
        "count = child.visits",
        f"{ALGORITHMS} -k diverse",
    ),
    (  # a told path still waits
        "drllm_fast/search/mcts.py",
        "node.waiting -= 1",
        "node.waiting -= 0",
        f"{ALGORITHMS} -k add_up",
    ),
    (  # virtual visits lower no mean
        "drllm_fast/search/mcts.py",
        "mean * child.visits / count + explore",
        "mean + explore",
        f"{ALGORITHMS} -k ucb",
    ),
    (  # a node for each way to a path
        "drllm_fast/search/mcts.py",
        "if path not in self.nodes:",
        "if True:",
        f"{ALGORITHMS} -k share_a_node",
    ),
    (  # only the leaf is told
        "drllm_fast/search/mcts.py",
        "self._count(walk, outcome.reward)",
        "self._count(walk[-1:], outcome.reward)",
        f"{ALGORITHMS} -k add_up",
    ),
    (  # rewards in their own unit
        "drllm_fast/search/mcts.py",
        "self._binary &= reward in (0, 1)",
        "self._binary &= True",
        f"{ALGORITHMS} -k 'unit or ucb'",
    ),
    (  # never a random child
        "drllm_fast/search/mcts.py",
        "self.rng.random() < self.config.random_child",
        "self.rng.random() < 0",
        f"{ALGORITHMS} -k random_children",
    ),
    (  # a block's gain is what its edit costs
        "drllm_fast/search/mcts.py",
        "total += gain / (count + 1)",
        "total -= gain / (count + 1)",
        f"{ALGORITHMS} -k gains",
    ),
    (  # gains are counted once only
        "drllm_fast/search/mcts.py",
        "self._gains[change] = total + gain, count + 1",
        "self._gains.setdefault(change, (0.0, 1))",
        f"{LANDSCAPES} -k tree",
    ),
    (  # skips are as good as repeats while rewards are 0 and 1
        "drllm_fast/search/mcts.py",
        "total -= self._penalty(times - EXECUTE)",
        "total -= 0 * self._penalty(times - EXECUTE)",
        f"{LANDSCAPES} -k tree",
    ),
    (  # the prior is not followed
        "drllm_fast/search/mcts.py",
        "(self._skip_weights[block] if times == SKIP else 1)",
        "1",
        f"{ALGORITHMS} -k prior",
    ),
    (  # large weights go last
        "drllm_fast/search/base.py",
        "return -math.log1p(-draw) / weight if weight > 0 else math.inf",
        "return -math.log1p(-draw) * weight",
        f"{ALGORITHMS} -k prior",
    ),
    (  # no end to simulations
        "drllm_fast/search/base.py",
        "self.asked >= self.config.simulations",
        "self.asked > self.config.simulations",
        f"{ALGORITHMS} -k 'simulations or every'",
    ),
    (  # one visit saved is enough
        "drllm_fast/search/base.py",
        "saved >= EARLY_STOP_SAVING",
        "saved > 0",
        f"{ALGORITHMS} -k saving",
    ),
    (  # a repaired answer is not enough
        "drllm_fast/search/base.py",
        "not self.told[self.dense].correct or saved",
        "saved",
        f"{ALGORITHMS} -k early_stop",
    ),
    (  # no largest length
        "drllm_fast/search/base.py",
        "if visits(edit) <= self._longest]",
        "]",
        f"{ALGORITHMS} -k every",
    ),
    (  # the worst are edited
        "drllm_fast/search/beam.py",
        "(-self.told[path].reward, visits(path))",
        "(self.told[path].reward, visits(path))",
        f"{ALGORITHMS} -k beam",
    ),
    (  # longer ones first
        "drllm_fast/search/beam.py",
        "(-self.told[path].reward, visits(path))",
        "(-self.told[path].reward, -visits(path))",
        f"{ALGORITHMS} -k beam",
    ),
    (  # away from what pays
        "drllm_fast/search/policy_gradient.py",
        "logits[choice] += step",
        "logits[choice] -= step",
        f"{ALGORITHMS} -k learns",
    ),
    (  # no baseline
        "drllm_fast/search/policy_gradient.py",
        "(2 * len(self._rewards)) - 0.5)",
        "(2 * len(self._rewards)))",
        f"{LANDSCAPES} -k gradient",
    ),
    (  # no budget
        "drllm_fast/search/policy_gradient.py",
        "if fits(p := tilted(0.0)):",
        "if fits(p := tilted(0.0)) or True:",
        f"{ALGORITHMS} -k 'projection or learns'",
    ),
    (  # much influence, much weight
        "drllm_fast/search/priors.py",
        "2 * middle / (middle + score)",
        "2 * score / (middle + score)",
        "tests/test_search_priors.py",
    ),
]
