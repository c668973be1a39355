"""Simulated devices, links and a cloud, many worlds at a time, to try decision makers on.

| module | holds |
| --- | --- |
| `physics` | the bills of menus as arrays; the cost of moves |
| `batching` | a batching server: iterations, cache |
| `params` | what a world is like |
| `counters`, `paths`, `draws` | everything random, drawn beforehand: links and clouds, then requests |
| `state` | a moment |
| `phases` | what requests in flight take, and what work they leave |
| `step` | from one event to the next |
| `endings`, `changes`, `cloud` | what an event brings: requests end; the world changes; a shared cloud governs |
| `past` | what devices remember |
| `asking` | questions to decision makers, and their answers |
| `episode` | a whole run and its records |
| `scenarios` | the settings that claims are made for |
| `recordings` | folders of recorded links: found, read, and kept apart to judge by and to learn from |
| `worlds` | worlds that wait for answers, and what the time between costs |
| `gym` | the same as Gymnasium environments |
"""
