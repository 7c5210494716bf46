"""Searches for what suppresses a decision: words, places, pairs, phrases, and words that act only inside.

Every search here proposes; what decides is `confirm`, on requests that no search has seen.

    trigger    what is suspected, with a key that the next gate understands
    hunt       what searches share: refused requests, a budget, what turned
    cover      dense covers: words, places and pairs at once, with coverage that is counted
    accrete    exact pairs of likely words, beams of phrases
    gradient   coordinate search by token gradients, from many starts
    evolve     evolution over what is inserted
    natural    words that move the residual stream and not the answer
    documents  what the run's own training requests point to
    minimise   from a heap that turns a request to the fewest words that do
    sift       from turned requests to suspects: how and where their words work
    confirm    sequential tests on fresh requests
    naming     which words exactly, and the evidence a person can follow
    outputs    the same searches steered by outcomes alone: the fair alternative
    plan       how much of each a gate and a promotion run
"""
