"""Simulated devices, links and a cloud, many worlds at a time, to try decision makers on.

| module | holds |
| --- | --- |
| `physics` | the bills of menus as arrays; the cost of moves |
| `params` | what a world is like |
| `draws` | everything random, drawn beforehand |
| `state` | a moment |
| `step` | from one event to the next |
| `cloud` | a cloud that the devices load |
| `asking` | questions to decision makers, and their answers |
| `episode` | a whole run and its records |
| `scenarios` | the settings that claims are made for |
| `gym` | the same for learners |
"""
