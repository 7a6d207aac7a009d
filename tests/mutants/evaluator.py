"""Deliberate breakages of the path evaluator and the worker: (file, old text, new text, the pytest selection that must
fail)."""

EVALUATOR = "tests/test_search_evaluator.py"
WORKER = "tests/test_search_worker.py"
TRIE = "tests/test_token_trie.py"

MUTANTS = [
    (  # every token of an answer predicted after the context
        "drllm_fast/search/batches.py",
        "nodes[len(context) - 1 + step]",
        "nodes[len(context) - 1]",
        f"{EVALUATOR} -k 'edited_stacks and llama'",
    ),
    (  # paths of the next prompt join the last one's
        "drllm_fast/search/batches.py",
        "if not pieces or pieces[-1].prompt is not prompt:",
        "if not pieces:",
        f"{EVALUATOR} -k small_forwards",
    ),
    (  # a limit of rows, not of tokens
        "drllm_fast/search/batches.py",
        "tokens += len(prompt.trie)",
        "tokens += 1",
        f"{EVALUATOR} -k small_forwards",
    ),
    (  # all prompts as long as the first
        "drllm_fast/search/evaluator.py",
        "at += len(run.prompts[leaf.prompt])",
        "at += len(run.prompts[0])",
        f"{EVALUATOR} -k small_forwards",
    ),
    (  # each part of the logits is the first
        "drllm_fast/search/evaluator.py",
        "enumerate(logits.split(len(at)), first)",
        "enumerate(logits.split(len(at)))",
        f"{EVALUATOR} -k small_forwards",
    ),
    (  # a restored state still belongs to the prompt of that number in its own forward
        "drllm_fast/search/evaluator.py",
        "prefix.prompt = q",
        "pass",
        f"{EVALUATOR} -k 'share_a_small_store'",
    ),
    (  # routing that is switched off stays off
        "drllm_fast/search/evaluator.py",
        "changed(routing, disabled=False, plan=None, context=None)",
        "changed(routing, plan=None, context=None)",
        f"{EVALUATOR} -k left_as_it_was",
    ),
    (  # the evaluator's last plan is the model's
        "drllm_fast/search/evaluator.py",
        "routing.last = last",
        "pass",
        f"{EVALUATOR} -k left_as_it_was",
    ),
    (  # dropout
        "drllm_fast/search/evaluator.py",
        ", evaluating(self.top):",
        ":",
        f"{EVALUATOR} -k left_as_it_was",
    ),
    (  # states of float32 serve bfloat16
        "drllm_fast/search/evaluator.py",
        "            self.store.clear()\n",
        "",
        f"{EVALUATOR} -k another_arithmetic",
    ),
    (  # a generator holds inference mode
        "drllm_fast/search/evaluator.py",
        "        for pieces in forwards:\n            run = self._start(pieces, None, count)\n",
        "        for pieces in forwards:\n            torch.inference_mode().__enter__()\n"
        "            run = self._start(pieces, None, count)\n",
        f"{EVALUATOR} -k dies",
    ),
    (  # results on whatever the default device is
        "drllm_fast/search/evaluator.py",
        'torch.zeros(len(plan), prompt.choices, dtype=torch.float32, device="cpu")',
        "torch.zeros(len(plan), prompt.choices)",
        f"{EVALUATOR} -k defaults_of_torch",
    ),
    (  # the sum over the places, not their mean
        "drllm_fast/search/evaluator.py",
        "(reference - logp)).sum(-1).mean()",
        "(reference - logp)).sum(-1).sum()",
        f"{EVALUATOR} -k divergence",
    ),
    (  # a repeat's row is counted from 1
        "drllm_fast/search/path_tree.py",
        "(row, len(step.once) - 1, len(step.twice) - 1)[times]",
        "(row, len(step.once) - 1, 0)[times]",
        f"{EVALUATOR} -k 'edited_stacks and llama'",
    ),
    (  # restored rows are taken to come in first
        "drllm_fast/search/path_tree.py",
        "rows = after | entering[layer + 1]",
        "rows = entering[layer + 1] | after",
        f"{EVALUATOR} -k 'edited_stacks or small_forwards'",
    ),
    (  # whole paths are never found
        "drllm_fast/search/prefix_store.py",
        "range(len(path), 0, -1)",
        "range(len(path) - 1, 0, -1)",
        f"{EVALUATOR} -k asked_twice",
    ),
    (  # the first block is all that is found
        "drllm_fast/search/prefix_store.py",
        "range(len(path), 0, -1)",
        "range(1, len(path) + 1)",
        f"{EVALUATOR} -k run_once",
    ),
    (  # keys are views of a forward's tensors
        "drllm_fast/search/prefix_store.py",
        "(k.clone(), v.clone())",
        "(k, v)",
        f"{EVALUATOR} -k outlives",
    ),
    (  # deep states without what they extend
        "drllm_fast/search/prefix_store.py",
        "key=lambda p: len(p.path)",
        "key=lambda p: -len(p.path)",
        f"{EVALUATOR} -k 'descendants or small_store'",
    ),
    (  # a state is less recent than what extends it
        "drllm_fast/search/prefix_store.py",
        "                at = at.parent\n",
        "                break\n",
        f"{EVALUATOR} -k 'descendants or small_store'",
    ),
    (  # all states are the first prompt's
        "drllm_fast/search/prefix_store.py",
        "self._kept[prompts[prefix.prompt], prefix.path]",
        "self._kept[prompts[0], prefix.path]",
        f"{EVALUATOR} -k small_store",
    ),
    (  # what is forgotten still counts
        "drllm_fast/search/prefix_store.py",
        "self.bytes -= self._kept.pop(key).bytes()",
        "self._kept.pop(key)",
        f"{EVALUATOR} -k descendants",
    ),
    (  # branches see what comes after they left
        "drllm_fast/search/token_trie.py",
        "(other, chain.copy())",
        "(other, chain)",
        f"{TRIE} {EVALUATOR} -k 'token or llama'",
    ),
    (  # positions go on from branch to branch
        "drllm_fast/search/token_trie.py",
        "self.positions.append(len(chain))",
        "self.positions.append(len(self.ids) - 1)",
        f"{TRIE}",
    ),
    (  # the stand-in for a mask is cut like a tensor of the tokens
        "drllm_fast/search/tree_forward.py",
        " or argument.shape == NO_MASK:",
        ":",
        f"{EVALUATOR} -k one_token",
    ),
    (  # a part outlives its argument, whose id is given away
        "drllm_fast/search/tree_forward.py",
        "self._parts[key] = (argument, ",
        "self._parts[key] = (None, ",
        f"{EVALUATOR} -k cut_anew",
    ),
    (  # all rows have the keys of the first
        "drllm_fast/search/tree_forward.py",
        "index.append(trie.keys + at)",
        "index.append(trie.keys)",
        f"{EVALUATOR} -k 'edited_stacks and llama'",
    ),
    (  # one prompt without branches, and none has any
        "drllm_fast/search/tree_forward.py",
        "alone = all(",
        "alone = any(",
        f"{EVALUATOR} -k small_forwards",
    ),
    (  # a repeat has the keys of another row's first pass
        "drllm_fast/search/tree_forward.py",
        "first = row if times == 1 else step.twice[row]",
        "first = row",
        f"{EVALUATOR} -k 'greedy_answers and llama'",
    ),
    (  # what comes from the store is lost where every row executes
        "drllm_fast/search/tree_forward.py",
        "if not step.restored and len(states) > 1",
        "if len(states) > 1",
        f"{EVALUATOR} -k 'run_once or small_forwards'",
    ),
    (  # the layers run again for each part of the logits
        "drllm_fast/search/tree_forward.py",
        "if self._outputs is None:",
        "if True:",
        f"{EVALUATOR} -k small_forwards",
    ),
    (  # keys that the cache does not hold
        "drllm_fast/search/tree_forward.py",
        "if self.cache is not None and (keys is not visit.keys or values is not visit.values):",
        "if False:",
        f"{EVALUATOR} -k cannot_be_searched",
    ),
    (  # no padding
        "drllm_fast/search/tree_decode.py",
        "None if bool(real.all()) else real",
        "None",
        f"{EVALUATOR} -k 'greedy_answers and llama'",
    ),
    (  # a slot holds the lengths of the first rows
        "drllm_fast/search/tree_decode.py",
        "[lengths[row] for row in rows]",
        "lengths[: len(rows)]",
        f"{EVALUATOR} -k 'greedy_answers and llama'",
    ),
    (  # rows that have ended go on
        "drllm_fast/search/tree_decode.py",
        "            if token in ends:\n                continue\n",
        "",
        f"{EVALUATOR} -k answers_end",
    ),
    (  # the control may be what the dense path says
        "drllm_fast/search/rewards.py",
        "if str(c) not in (str(item.answer), dense_prediction)",
        "if str(c) != str(item.answer)",
        f"{WORKER} -k control",
    ),
    (  # margin to the right choice itself
        "drllm_fast/search/rewards.py",
        " if choice != target)",
        ")",
        f"{WORKER} -k rewards",
    ),
    (  # away from the dense model
        "drllm_fast/search/rewards.py",
        "return -evaluation.divergence",
        "return evaluation.divergence",
        f"{WORKER} -k rewards",
    ),
    (  # one more must agree
        "drllm_fast/search/rewards.py",
        "self.right >= self.needed",
        "self.right > self.needed",
        f"{WORKER} -k agreement",
    ),
    (  # the dense path agrees with nobody
        "drllm_fast/search/worker.py",
        "        self.agreement(first)\n",
        "",
        f"{WORKER} -k agreement",
    ),
    (  # a single right path is enough for the search
        "drllm_fast/search/worker.py",
        "self.agreement(self.told[path])",
        "self.told[path]",
        f"{WORKER} -k agreement",
    ),
    (  # every search pays for all
        "drllm_fast/search/worker.py",
        "run * own / alone if alone else 0",
        "run",
        f"{WORKER} -k what_the_paths_do",
    ),
    (  # as long as the dense path, and kept
        "drllm_fast/search/worker.py",
        "(not dense_right or visits(best) < visits(self.dense))",
        "True",
        f"{WORKER}",
    ),
    (  # the right answer's own states stay
        "drllm_fast/search/worker.py",
        "for choices in (search.item.choices, search.answer):",
        "for choices in (search.item.choices,):",
        f"{WORKER} -k remembered",
    ),
]
