"""Training routers: from searched paths, or from prices of blocks, to a checkpoint that keeps a budget.

examples     prompts with their labels, from what a search stored
windows      what the routers see: pooled windows of every block, from one pass of the frozen model
window_file  the same on disk
loss         the published loss and its alternatives
fit          trains all routers of a model together on stored windows: fit_config, fit_inputs (checks), fit_checkpoint,
             fit_report; descent, the optimiser; groups, robust sampling
metrics      what a fit reports
trackers     where it reports to
prices       what leaving out blocks costs, fitted to measured paths
orders       in which order the blocks of a prompt are best left out, and the loss that teaches it
price_lesson from measured paths to examples, targets and objective
elimination  which blocks a kind of prompts can best do without, by measuring
block_order  the order of one kind as a file, and the lesson made of several
calibrate    the table of budgets and penalties
refine       policy gradient on the routers, so that they go together: refine_state, a step; draws, paths from the
             routers' own probabilities; path_values, what they are worth; advantages; bracket, figures at a budget
"""
