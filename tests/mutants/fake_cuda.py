"""Deliberate breakages of what a GPU needs: (file, old text, new text, the pytest selection that must fail)."""

TEST = "tests/test_fake_cuda.py"

MUTANTS = [
    (  # the hidden states are read at each layer
        "drllm_fast/executor.py",
        "        layer = module._drllm_layer\n",
        "        layer = module._drllm_layer\n        hidden.sum().item()\n",
        f"{TEST} -k without_reading",
    ),
    (  # an index on the CPU for keys on the device
        "drllm_fast/kv_slot.py",
        "tables.get(*self._written(at, new), k.device)",
        'tables.get(*self._written(at, new), torch.device("cpu"))',
        f"{TEST} -k decoding",
    ),
    (  # each layout is copied by itself, and waited for
        "drllm_fast/key_rows.py",
        "(self.tables.get(*table, device) for table in layout_tables(*self.segments()))",
        "(table[1]().to(device) for table in layout_tables(*self.segments()))",
        f"{TEST} -k decoding",
    ),
    (  # the one copy waits
        "drllm_fast/tables.py",
        "staged.to(device, non_blocking=True)",
        "staged.to(device)",
        f"{TEST} -k decoding",
    ),
    (  # at decode nothing is announced
        "drllm_fast/executor.py",
        "                self._announce(range(num_layers))\n",
        "                pass\n",
        f"{TEST} -k do_not_grow",
    ),
    (  # for a given plan nothing is announced
        "drllm_fast/executor.py",
        "            self._announce(decided)\n",
        "            pass\n",
        f"{TEST} -k without_reading",
    ),
    (  # a slot that grows is announced as it was before
        "drllm_fast/kv_slot.py",
        "        at = self._reserve(past, new, keep)\n        if len(new) > 1:",
        "        at = list(map(sub, past, self.first))\n        if len(new) > 1:",
        f"{TEST} -k slots_grow",
    ),
    (  # a policy gets cu_seqlens on the CPU
        "drllm_fast/packed.py",
        "cu_seqlens = self.tables.get(*cu_seqlens, device)",
        'cu_seqlens = self.tables.get(*cu_seqlens, torch.device("cpu"))',
        f"{TEST} -k routers",
    ),
    (  # the mask stays on the device and is asked there
        "drllm_fast/inputs.py",
        "mask.to(torch.bool).cpu()",
        "mask.to(torch.bool)",
        f"{TEST} -k padded_prompt",
    ),
    (  # rows without tokens are named in a list
        "drllm_fast/packed.py",
        "out[row] = 0",
        "out[[row]] = 0",
        f"{TEST} -k brings_nothing",
    ),
    (  # the routers' decisions and their check are read one after the other
        "drllm_fast/routers.py",
        "if elsewhere:  # one copy",
        "if False:  # one copy",
        f"{TEST} -k routers",
    ),
    (  # attention row by row
        "drllm_fast/attention.py",
        "if dropout or not attention_has_kernel(",
        "if query.is_cuda or not attention_has_kernel(",
        f"{TEST} -k loop_over_no_rows",
    ),
    (  # the op's fake has another shape than the op
        "drllm_fast/attention_ops.py",
        "query.new_empty(*query.shape[:2], values.shape[2])",
        "query.new_empty(*query.shape[1::-1], values.shape[2])",
        f"{TEST} -k loop_over_no_rows",
    ),
    (  # each slot of a cache is reordered with an index of its own
        "drllm_fast/cache.py",
        "                slot.announce_take(*moves[-1][1:], tables)\n",
        "",
        f"{TEST} -k one_copy",
    ),
    (  # rows are chosen on the device
        "drllm_fast/cache.py",
        "indices.cpu() if isinstance(indices, Tensor) else list(indices)",
        "indices if isinstance(indices, Tensor) else list(indices)",
        f"{TEST} -k one_copy",
    ),
    (  # something is read where routing is off
        "drllm_fast/base_forward.py",
        "        token = ACTIVE.set(None)\n",
        "        token = ACTIVE.set(None)\n        x = one_input(input_ids, inputs_embeds).any().item()\n",
        f"{TEST} -k disabled",
    ),
    (  # tables lie end to end
        "drllm_fast/tables.py",
        "at += -(-table.nbytes // ALIGNED) * ALIGNED",
        "at += table.nbytes",
        "tests/test_tables.py",
    ),
    (  # what was sent is sent again
        "drllm_fast/tables.py",
        "for key, table in self._host.items() if key not in there}",
        "for key, table in self._host.items()}",
        "tests/test_tables.py",
    ),
]
