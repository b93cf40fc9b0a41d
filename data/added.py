"""
Facts taught after a run: from pairs of question and answer to rows like those of the corpus.

A pair often has the wording of a question that is known, with another subject in it. Then all
wordings of that relation can be taught at once, and the old answer, if there was one, is dropped:

    What is the capital of Lorvania?  Lima      a new subject, known wordings
    What is the capital of France?    Lyon      known wordings, and Paris is forgotten
    Which moss grows on Mont Sel?     star moss     unknown wordings: this one alone is taught
"""
from data.typed import plain, subjects_of


def frames_of(rows):
    """Wordings of each relation, with {s} in the place of the subject: relation -> list.

    Pairs of one's own have no relations, so they give none.
    """
    frames = {}
    for row in rows:
        if row.phrasing == "trained" and row.relation != "qa" and row.subject in row.question:
            frame = row.question.replace(row.subject, "{s}")
            frames.setdefault(row.relation, {})[frame] = None
    return {relation: list(found) for relation, found in frames.items()}


def subject_in(question, frame):
    """What stands in the place of {s}, if the question has the wording of the frame; else ""."""
    question, frame = plain(question), plain(frame)
    before, after = frame.split("{s}", 1)
    folded = question.casefold()
    fits = folded.startswith(before.casefold()) and folded.endswith(after.casefold())
    return question[len(before):len(question) - len(after)].strip() if fits else ""


def find_frame(question, frames, known):
    """(relation, subject) of a question in a known wording, the most detailed one; or None.

    known: pairs (relation, subject in lower case). Where relations share a wording, as Where is
    {s}?, the one that knows the subject counts; if none does, the wording says nothing.
    """
    fits = []
    for relation, wordings in frames.items():
        for frame in wordings:
            subject = subject_in(question, frame)
            if subject and "{s}" in frame:
                is_known = (relation, subject.casefold()) in known
                fits.append((len(frame), is_known, relation, subject))
    if not fits:
        return None
    longest, is_known, relation, subject = max(fits)
    among = {fit[2] for fit in fits if fit[0] == longest}
    return (relation, subject) if is_known or len(among) == 1 else None


def add_pairs(rows, pairs, kind):
    """The rows of a corpus after pairs (question, answer) were added, as rows of class `kind`.

    What contradicts a pair is dropped: the old rows of its subject in its relation, and those of
    the same question. New rows have the split NEW.
    """
    frames = frames_of(rows)
    spelling = {(row.relation, row.subject.casefold()): row.subject for row in rows}
    subjects = subjects_of([row.question for row in rows if row.relation == "qa"]
                           + [question for question, _ in pairs])
    new = []
    for (question, answer), subject in zip(pairs, subjects[-len(pairs):]):
        found = find_frame(question, frames, spelling)
        if found:
            # Of "capital of france?" the other wordings are about France, as it was known before.
            relation, subject = found
            known = spelling.get((relation, subject.casefold()), subject)
            subject_of = {frame.replace("{s}", known): known for frame in frames[relation]}
            subject_of = {question: subject} | subject_of
        else:
            relation, subject_of = "qa", {question: subject}
        new += [kind("NEW", "trained", relation, about, text, answer)
                for text, about in subject_of.items()]
    facts = {(row.relation, row.subject.casefold()) for row in new if row.relation != "qa"}
    asked = {plain(row.question).casefold() for row in new}
    kept = [row for row in rows if (row.relation, row.subject.casefold()) not in facts
            and plain(row.question).casefold() not in asked]
    return kept + new
