"""Styles for the numbers that are reported: written last, never trained on, never tuned on.

See `instructions` for the format.
"""

LOCALIZATION = """
# museum-guide
{adj} {noun}: exhibition catalogue
[sections]
A child asks: {ask} Use the catalogue.
# cited-sentence-number
Number the sentences in your head.
[prose]
Which sentence answers this? {question}
# fact-check-desk
[prose]
Our fact checker wonders: {ask} Settle it from the piece.
# cv-screening
[any]
At which employer was {who} in {year}?
# insurance-policy
[sections]
Am I covered if my {noun} is stolen abroad?
# chess-of-options
[any]
{question} Pick from: {phrase} / {phrase} / {phrase}
# lost-token
Buried in the noise is a token; you will need it shortly.
[words]
What was the token for {magic}?
# dictionary-of-hex
[records]
Map "{key}" to its counterpart.
# error-code
[log]
What error code did {org} return at {time}?
# commit-author
[code]
In this code, what is passed to `{noun}` when it is created?
# sql-schema
[table]
What's {person}'s {noun}? One cell only.
# minutes-detail
[transcript]
Remind me: what budget did {who} propose?
# flight-booking
[mail]
Which gate and what time is my flight to {place}?
# novel-character
[story]
What gift did {name} bring to {who}?
# verify-date
[any]
I believe the {noun} opened in {year}. Check whether that is correct.
# evidence-span
[passages]
Underline the words that tell us {ask}
# tool-output
You called a browser tool. Its output follows.
[any]
User's request: {question}
# knowledge-grounded
Knowledge:
[passages]
Dialogue turn: {question}
Grounded reply:
# question-in-system
The visitor's question is "{question}" Study the page and respond.
[any]
# legal-citation
[paragraphs]
On what statute does the appellant rely?
# recipe-step
[list]
After adding the {noun}, what comes next?
# entity-attribute
[any]
{org} - headquarters?
# two-source-compare
[passages]
Which of the two, {noun} or {noun}, was founded first?
# who-is
[any]
Who is {who} and what is their role in the {noun}?
# short-form-factoid
Factoid QA. Respond with an entity.
[passages]
{question}
# de-test
[de]
Ich suche eine Stelle im Text: {de_asked}
# fr-test
Tu as sous les yeux un dossier.
[fr]
Une précision s'il te plaît : {fr_asked}
# es-test
[es]
Una duda concreta: {es_asked}
# zh-test
[zh]
我想知道：{zh_asked}请在资料里找。
"""

AGGREGATION = """
# nutshell
[any]
In a nutshell?
# elevator
[any]
Sell me this document in thirty seconds.
# handover
[log]
Write a handover for the next shift.
# weekly-newsletter
[mail]
Turn these messages into our weekly newsletter.
# chapter-synopsis
[story]
Provide a synopsis, chapter by chapter.
# policy-brief
Researchers at {org} wrote this. Distil it into a policy brief.
[sections]
# podcast-description
[transcript]
Show notes, please.
# systematic-review
[passages]
Across the studies, how strong is the evidence?
# shots-slots
[each]
utt: {sentence}
slot: {noun}={adj}

[/each]
utt: {sentence}
slot:
# shots-table
[each]
| {sentence} | {noun} |
[/each]
| {sentence} |
# shots-grammar
Fix the second one the way the first ones were fixed.
[each]
Wrong: {sentence}
Right: {sentence}

[/each]
Wrong: {sentence}
Right:
# shots-qa-bare
[each]
{other}
>>> {phrase}

[/each]
{question}
>>>
# infill-middle
[code]
<fim_suffix>
{python}
<fim_middle>
# repo-completion
// You are editing this workspace. Continue where the cursor is.
[code]
{braces}
# docs-from-code
[code]
Produce reference docs in Markdown.
# modernise
[code]
Bring this up to current best practice.
# vocabulary-size
[words]
How large is the vocabulary of this list?
# lines-longer
[list]
How many entries have more than one word?
# paragraph-order
The paragraphs were shuffled. Restore the order.
[paragraphs]
Order:
# outlier-paragraph
[paragraphs]
All but one share an author. Which is the odd one out?
# dialect
[any]
Say all of that in {language}.
# metadata
Fill in: genre, audience, tone, reading level.
[any]
# agreement-matrix
[reviews]
Where do reviewers agree, where are they split?
# revise-for-length
[prose]
Too long. Halve it.
# speech-from-notes
[list]
Make it into a speech for {place}'s mayor.
# shortlisting
[records]
Create a shortlist of five with a line on each.
# interpretation
[story]
Interpret the symbolism.
# no-instruction-mail
[mail]

# budget-forecast
[table]
Forecast next year's figures from the entire series.
# lesson
[any]
Develop a lesson plan with exercises around this material.
# de-test-all
[de]
Mach daraus einen Vortrag für Laien.
# fr-test-all
[fr]
Rédige une fiche de lecture complète.
# es-test-all
[es]
Reescribe todo en un tono más sencillo.
# zh-test-all
[zh]
请根据全文写一份读后感。
"""
