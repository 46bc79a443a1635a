"""Adapters to what others have: tools, environments, traces and models.

Each module needs one package, which is an extra of its name, and imports it when it is used:

| module | brings | extra |
|---|---|---|
| `plugs.mcp` | the tools of an MCP server, over stdio or HTTP | `mcp` |
| `plugs.gym` | Gymnasium's text environments | `gymnasium` |
| `plugs.textworld` | TextWorld's games, as a world to evaluate and to train on | `textworld` |
| `plugs.openenv` | an OpenEnv server | `openenv` |
| `plugs.verifiers` | environments of `verifiers`, and their traces as layouts | `verifiers` |
| `plugs.chat` | any OpenAI-compatible chat model as the policy, for evaluation | `agent` |
"""
