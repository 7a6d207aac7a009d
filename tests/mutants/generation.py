"""Deliberate breakages of the engine that answers many prompts: (file, old text, new text, the pytest selection that
must fail)."""

ENGINE, BATCH = "drllm_fast/generation/engine.py", "drllm_fast/generation/decode_batch.py"
POOL, SAMPLING = "drllm_fast/generation/kv_pool.py", "drllm_fast/generation/sampling.py"
STREAM, READ = "drllm_fast/generation/text_stream.py", "drllm_fast/generation/prompt_forward.py"
SCHEDULE = "drllm_fast/generation/schedule.py"
REQUESTS, GENERATE = "drllm_fast/generation/requests.py", "drllm_fast/generation/generate.py"
OF_ENGINE, OF_ENDINGS = "tests/test_generation_engine.py", "tests/test_generation_endings.py"
OF_MODEL, OF_POOL = "tests/test_generation_model.py", "tests/test_kv_pool.py"
OF_SAMPLING, OF_STREAM = "tests/test_sampling.py", "tests/test_text_stream.py"
ALONE = f"{OF_ENGINE} -k 'alone and (llama or mistral)'"

MUTANTS = [
    # -- the decode batch: positions, lengths, places, ranks of visits
    (BATCH, "torch.from_numpy(lengths - 1)", "torch.from_numpy(lengths)", ALONE),
    (BATCH, "self.positions += 1", "", ALONE),
    (BATCH, "first + held - 1))", "first + held))", ALONE),
    (BATCH, "        self._held += 1\n", "", ALONE),
    (BATCH, "        self._parts.clear()\n", "", f"{OF_ENGINE} -k keeps_nothing"),
    (BATCH, "key = (id(argument), id(group))", "key = id(argument)", ALONE),
    (BATCH, "np.cumsum(runs, axis=1) - runs)", "np.cumsum(runs, axis=1))", ALONE),  # a row's rank among its visits
    (BATCH, "np.stack((plan >= 1, plan == 2), axis=2)", "np.stack((plan >= 1, plan == 2), axis=1)", ALONE),
    (BATCH, "first, count = self.span", "first, count = 0, self.span[1]", ALONE),
    (BATCH, "rows[-1] - rows[0] == len(rows) - 1", "rows[-1] - rows[0] <= len(rows)", ALONE),  # gaps count as none
    (BATCH, "mine = runs[row, 2 * layer + number]", "mine = runs[row, 2 * layer]", ALONE),
    (BATCH, "np.cumsum(lengths) - lengths, lengths)", "np.cumsum(lengths), lengths)", ALONE),
    (BATCH, "self._latest = -1\n        self._parts", "self._parts", ALONE),
    # -- the engine: who comes and goes, and what is given back
    (ENGINE, "        if place == \"running\":\n            self._batch = None\n", "", OF_ENDINGS),
    (ENGINE, "            if not group and self.schedule.refill():\n                self._batch = None\n",
     "            if not group:\n                self.schedule.refill()\n", f"{OF_ENDINGS} -k random"),
    (ENGINE, "capacity = len(ids) + new - 1", "capacity = len(ids) + new", ALONE),
    (ENGINE, "capacity = len(ids) + new - 1", "capacity = len(ids) + new - 2", ALONE),
    (ENGINE, "new = min(new, self.positions - len(ids))", "pass", f"{OF_ENDINGS} -k positions"),
    (ENGINE, "if span else 0)", "if span else self.pool.allocate(1))", OF_ENDINGS),
    (ENGINE, "starts.append(self.pool.allocate(span) if span else 0)",
     "starts.append(self.pool.allocate(2 * span) if span else 0)", OF_ENDINGS),
    (ENGINE, "self.pool.release(request.start, request.span)", "self.pool.release(request.start, request.capacity)",
     ALONE),
    (ENGINE, "                if span:\n                    self.pool.release(start, span)\n", "                pass\n",
     "tests/test_engine_failures.py"),
    (ENGINE, "            set_budget(own, budget)\n", "", f"{OF_ENGINE} -k budgets"),
    (ENGINE, "own = copy(policy)", "own = policy", f"{OF_ENGINE} -k budgets"),
    (ENGINE, "key = (id(policy), type(budget), budget)", "key = budget", f"{OF_ENGINE} -k budgets"),
    (SCHEDULE, "or not _together(request, group[0])", "", f"{OF_ENGINE} -k budgets"),
    (ENGINE, "if settings.disabled:", "if False:", f"{OF_ENGINE} -k disabled"),
    (ENGINE, "settings.plan or self._owner.policy", "self._owner.policy", f"{OF_ENGINE} -k using"),
    (SCHEDULE, "tokens > self.max_prompt_tokens", "tokens > 2 * self.max_prompt_tokens", f"{OF_ENGINE} -k at_once"),
    (SCHEDULE, "room = self.max_batch + self.lookahead - len(self.running)", "room = self.max_batch + self.lookahead",
     f"{OF_ENGINE} -k at_once"),
    (SCHEDULE, "free = min(self.max_batch - len(self.running)", "free = min(self.max_batch + 1 - len(self.running)",
     ALONE),
    (ENGINE, "[len(r.tokens) for r in rows])\n", "[0 for r in rows])\n", f"{OF_ENGINE} -k seeds"),
    (ENGINE, "and not request.sampling.ignore_eos", "", f"{OF_ENDINGS} -k sequence"),
    (ENGINE, "            request.held += 1\n", "            pass\n", ALONE),
    (ENGINE, "request.held = len(request.prompt)", "request.held = len(request.prompt) - 1", ALONE),
    (ENGINE, "engines[1].enter_context(evaluating(top))", "engines[1].callback(top.eval)", OF_MODEL),
    (ENGINE, "    engines[0] += 1\n", "", f"{OF_MODEL} -k in_turn"),  # the first to end leaves the model
    (ENGINE, '"_drllm_routing", None) is not self._owner:', '"_drllm_routing", 0) == 0:', f"{OF_MODEL} -k switched"),
    (GENERATE, "context.run(engine.submit, prompt", "engine.submit(prompt", f"{OF_MODEL} -k path_of_the_block"),
    (ENGINE, "        disable_dynamic_routing(top)\n", "        pass\n", OF_MODEL),
    (ENGINE, "            rows = group or list(self.schedule.running)\n", "            rows = group\n",
     f"{OF_ENDINGS} -k breaks"),
    (ENGINE, "self.pool.keys = self.pool.values = None", "pass", f"{OF_ENGINE} -k dtype"),
    (ENGINE, "ends = end_tokens(self.top, tokenizer)", "ends = end_tokens(self.top, None)",
     f"{OF_ENDINGS} -k sequence"),
    (ENGINE, "self.schedule.prompts(self.pool.largest)", "self.schedule.prompts(self.pool.size - self.pool.used)",
     OF_ENDINGS),  # scattered room
    (READ, "last = torch.tensor(packed.offsets[1:], device=\"cpu\").sub_(1)",
     "last = torch.tensor(packed.offsets[1:], device=\"cpu\").sub_(2).clamp_(0)", ALONE),
    (READ, "        logits = logits.index_select(0, last)\n", "        pass\n", f"{OF_ENGINE} -k logits_to_keep"),
    (REQUESTS, "return self.visits * self.capacity", "return self.visits * self.held", f"{OF_ENDINGS} -k sequence"),
    (GENERATE, "            if value is missing:\n", "            if False:\n", f"{OF_MODEL} -k refusals"),
    (GENERATE, "while more and len(engine.schedule.waiting) <", "while more or len(engine.schedule.waiting) <",
     f"{OF_ENDINGS} -k memory"),
    # -- the pool
    (POOL, "if room >= tokens:", "if room > tokens:", OF_POOL),
    (POOL, "(start + tokens, room - tokens)", "(start + tokens, room - tokens + 1)", OF_POOL),
    (POOL, "joins_before, joins_after = bool(at) and sum(before) == start,", "joins_before, joins_after = False,",
     OF_POOL),
    (POOL, "bool(after[1]) and start + tokens == after[0]", "False", OF_POOL),
    (POOL, "(at and sum(before) > start)", "(at and sum(before) > start + 1)", OF_POOL),
    (POOL, "        self.used -= tokens\n", "", OF_POOL),
    (POOL, "self.peak = max(self.peak, self.used)", "self.peak = self.used", OF_POOL),
    (POOL, "self.values.index_copy_(1, index,", "self.values.index_copy_(1, index * 0,",
     OF_POOL),
    (POOL, "tokens < 1 or start < 0", "start < 0", OF_POOL),
    # -- sampling
    (SAMPLING, "uniform([s.seed for s in some]", "uniform([0 for s in some]", OF_SAMPLING),
    (SAMPLING, "before >= column(", "before > column(", f"{OF_SAMPLING} -k exactly"),
    (SAMPLING, "before = p.cumsum(1) - p", "before = p.cumsum(1)", OF_SAMPLING),
    (SAMPLING, "place >= top_k", "place > top_k", OF_SAMPLING),
    (SAMPLING, "u.unsqueeze(1) * below[:, -1:]", "u.unsqueeze(1)", OF_SAMPLING),
    (SAMPLING, "tokens = _most_probable(logits, deepest)", "tokens = logits.topk(deepest).indices", OF_SAMPLING),
    (SAMPLING, "(bits >> 31) & 0x7FFFFFFF", "0", OF_SAMPLING),  # the order of negative scores turned around
    (SAMPLING, "(scores + 0.0)", "scores", OF_SAMPLING),
    (SAMPLING, "scores - logits.amax(1, keepdim=True)", "scores", OF_SAMPLING),
    (SAMPLING, "min(max(float(s.temperature), 1e-30), 1e30)", "float(s.temperature)", OF_SAMPLING),
    (SAMPLING, "chosen[index] = torch.where(sound, tokens, chosen[index])", "chosen[index] = tokens", OF_SAMPLING),
    (SAMPLING, "(number + np.uint64(1)) * golden", "number * golden", OF_SAMPLING),
    (SAMPLING, "z >> np.uint64(11)", "z >> np.uint64(12)", OF_SAMPLING),
    (SAMPLING, "stable=True)", "stable=False)", OF_SAMPLING),
    (SAMPLING, "[numbers[row] for row in drawn]", "numbers[: len(drawn)]", OF_SAMPLING),
    # -- the stream of a text
    (STREAM, "out, self._held = self._held[: min(ends)], \"\"", "out, self._held = self._held[: max(ends)], \"\"",
     OF_STREAM),
    (STREAM, "min(len(text), len(stop) - 1)", "min(len(text), len(stop) - 2)", OF_STREAM),
    (STREAM, "for n in range(min(len(text), len(stop) - 1), 0, -1)", "for n in range(1, min(len(text), len(stop) - 1))",
     OF_STREAM),
    (STREAM, "        if whole.endswith(\"\\ufffd\"):\n            return \"\"\n", "", OF_STREAM),
    (STREAM, "if whole.endswith(known) and known.strip():", "if whole.endswith(known):", OF_STREAM),
    (STREAM, "if whole.endswith(known) and known.strip():", "if known.strip():", OF_STREAM),
    (STREAM, "self._from, self._known = begin, known", "self._from, self._known = begin, whole", OF_STREAM),
    (STREAM, "            self._from, self._known = self._said, \"\"\n", "            return \"\"\n", OF_STREAM),
    (STREAM, "            rest += self._held\n", "", OF_STREAM),
    (STREAM, "skip_special_tokens=True", "skip_special_tokens=False", OF_STREAM),
    (STREAM, "- OVERLAP - LONGEST_CHARACTER, -1", "- OVERLAP - 1, -1", OF_STREAM),
]  # fmt: skip
