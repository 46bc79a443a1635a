"""verl trains MEM1 agents: actor, reference and critic compute under the plan of each trajectory.

`pip install mem1-kernels[verl]` puts a plugin into verl (0.9.1), which loads it by its entry point.
It does nothing until a config asks for it; docs/verl.md says how.

    settings    what the config, or a row of the data, says of episodes
    episode     one episode over verl's rollout server, as one sample
    layout      what travels with a sample; the samples of a micro-batch as one packed row
    sessions    the rollout replica's caches: one per episode, pruned in place
    refused     the config items that would make training inexact without a word
    plugin      what the entry point loads
    hooks       the classes that verl calls; only these import verl

Nothing here is imported by the rest of the package.
"""
