"""Styles that are never trained on, and the LongBench tasks in other words than LongBench's.

See `instructions` for the format.
"""

LOCALIZATION = """
# lookup-memo
I'll paste a long document, then ask for a single fact in it.
[any]
Okay, here it is: {ask}
# evidence-then-answer
First copy the line that contains the evidence, then state the answer on a new line.
[any]
{question}
# closed-book-off
Everything you need is in the material provided. Don't rely on memory.
[passages]
Respond to this: {question}
# trivia-night
[any]
Trivia time! {question} The material above has it.
# librarian
Act as a reference librarian. A visitor hands you these pages and wants to know something specific.
[passages]
Visitor: {question}
Librarian:
# police-report
{Police report no. {num}|Witness statement}
[any]
What colour was the car that {who} saw? What was its plate?
# clinical-trial
Trial protocol
[sections]
How many participants were enrolled at the {place} site? Which arm got placebo?
# due-diligence
[sections]
Does the lease contain a change-of-control provision? If yes, point me to it.
# true-false
Mark the statement T or F with respect to the reading.
[prose]
Statement: {sentence}
T or F:
# best-option-number
[any]
Which alternative is right? {question}
1) {phrase}
2) {phrase}
3) {phrase}
# pronoun
[story]
To whom does "he" refer in the last scene with {name}?
# stack-trace
Below is what the job printed.
[log]
Which exception made it crash, and in what file?
# grep-like
[any]
Show me the exact spot where {org} comes up for the first time.
# config-value
[records]
I need the current setting for {noun}. What is it?
# function-caller
[code]
Who calls `{verb}_{noun}` and with which argument?
# uuid-lookup
Memorise these identifier pairs.
[records]
{key} maps to which identifier?
# hidden-sentence
A sentence that does not belong has been slipped into this essay; be ready to recall it.
[prose]
What was the best thing to do in {place}, as stated there?
# ticket-thread
[mail]
Has {who} confirmed the refund? For what amount?
# spreadsheet
You see an export of our spreadsheet.
[table]
Look up {org} and tell me its {noun}.
# timeline-point
[any]
What took place right after {who} arrived in {place}?
# bank-statement
[table]
To which account did the transfer of {num} euros go?
# assistant-doc-chat
You help people with the file they uploaded: {noun}_{num}.pdf
[any]
can u tell me {ask}
# wiki-two-hop
[passages]
Using the encyclopedia entries, work out {ask}
# archive-clerk
{surname}'s estate papers follow.
[paragraphs]
To whom was the cottage left?
# dosage-check
[records]
I'm unsure about one entry: how strong is the {noun} tablet?
# de-heldout
Hier ist ein Dokument, danach will ich etwas daraus wissen.
[de]
{de_asked} Bitte nur den Namen oder die Zahl nennen.
# fr-heldout
Voici un document ; je cherche une information précise.
[fr]
Peux-tu me dire ceci : {fr_asked}
# es-heldout
A continuación hay un documento del que necesito un dato.
[es]
Dime, por favor: {es_asked}
# zh-heldout
以下是一份资料，我想查一个细节。
[zh]
请告诉我，{zh_asked}
"""

AGGREGATION = """
# gist
[any]
{Give me|I only need} the gist{, no details|}.
# blurb
[story]
Write the blurb for the back cover.
# brief-for-minister
You prepare a briefing for a minister who has two minutes.
[passages]
Briefing note:
# lecture-notes
[transcript]
Turn this recording into clean lecture notes.
# standup-digest
[dialogue]
Post a digest of this channel for colleagues who were away.
# takeaways
[any]
What are the key takeaways?
# literature-overview
Synthesise the studies below into a literature overview.
[passages]
Overview:
# shots-stars
[each]
"{sentence}" -> {1|2|3|4|5} stars
[/each]
"{sentence}" ->
# shots-headline
[each]
News: {paragraph}
Headline: {phrase}

[/each]
News: {paragraph}
Headline:
# shots-emotion
Each utterance gets an emotion. Learn from the solved cases and do the last.
[each]
Utterance: {sentence}
Emotion: {joy|anger|fear|surprise|sadness}
[/each]
Utterance: {sentence}
Emotion:
# shots-trivia
[each]
Context: {paragraph}
Q: {other}
A: {phrase}
---
[/each]
Context: {paragraph}
Q: {question}
A:
# autocomplete
You are an autocomplete engine. Output nothing but code.
[code]
{python}
    return
# fill-function-body
[code]
Implement the missing body of the last method.
# code-security
[code]
Audit the program for security holes.
# code-comments
Annotate the source with comments throughout.
[code]
# distinct-lines
[list]
Remove the duplicates. How many distinct lines are left?
# tally
[table]
Tally the votes for each candidate.
# source-of-synopsis
One of the numbered texts was condensed into the synopsis at the end. Say which.
[paragraphs]
Synopsis: {paragraph}
Text number:
# word-histogram
[words]
Build a histogram of the vocabulary and report the top entries.
# localise-file
Produce a {language} version, leaving nothing out.
[any]
# tags
[any]
Propose hashtags for this post.
# diff-versions
[passages]
In what respects do the versions diverge?
# legalese
Put this into words that my grandmother understands.
[sections]
# press-release
[any]
Compose a press release from the material.
# rank-candidates
[records]
Rank the applicants from strongest to weakest and justify the ranking.
# moral
[story]
What lesson does the tale teach?
# no-instruction-number
[table]

# stakeholder-update
[mail]
Put together an update for stakeholders that reflects the complete exchange.
# screenplay-pitch
[story]
Pitch this as a film.
# data-cleaning
Normalise the spelling of every entry and hand back the cleaned file.
[table]
# de-heldout-all
Stelle die wichtigsten Inhalte kurz dar.
[de]
Überblick:
# fr-heldout-all
[fr]
Dégage les grandes lignes de ce document en quelques phrases.
# es-heldout-all
Explica de forma breve de qué trata todo el documento.
[es]
Síntesis:
# zh-heldout-all
[zh]
这篇文章主要讲了什么？请简要概述。
"""

# Localization is the first group, as in WindowKV's table 1.
LONGBENCH = """
# NarrativeQA
A story is given (a book or a film script) with a question. Answer it concisely, with a single \
phrase if you can, and do not explain.
[story]
Using the story, answer the question as concisely as possible.
Question: {question}
Answer:
# Qasper
A scientific article and a question are given. Answer as concisely as possible; "unanswerable" if \
the article does not tell; "yes", "no" or "unanswerable" for yes/no questions.
[sections]
Answer the question from the article above.
Question: {question}
Answer:
# MultiFieldQA-en
Read this text and then answer briefly.
[any]
Now answer the question below from the text above, only with the answer and no other words.
Question: {question}
Answer:
# HotpotQA
Answer from the given passages. Output only the answer and no other words.
The passages:
[passages]
Answer from the given passages, only with the answer.
Question: {question}
Answer:
# 2WikiMultihopQA
Give the answer to the question, taken from the passages that follow, without further words.
[passages]
Question: {question}
Answer:
# MuSiQue
The passages below hold the answer to the question. Output the answer only.
[passages]
Question: {question}
Answer:
# GovReport
Here is a report of a government agency. Write a summary of one page.
Report:
[sections]
Write the one-page summary of the report now.
Summary:
# QMSum
A meeting's transcript and a query with a question or an instruction are given. Answer the query \
in \
one or a few sentences.
Transcript:
[transcript]
Query: What was said about {topic} and what did the team conclude?
Answer:
# MultiNews
Several news passages are given. Summarise all of them on one page.
News:
[passages]
Write the one-page summary of all news.
Summary:
# TREC
Determine the type of the question. Some examples follow.
[each]
Question: {other}
Type: {Number of something|City|Individual|Definition of something|Date}
[/each]
Question: {question}
Type:
# TriviaQA
Answer from the passage, only with the answer. Some examples follow.
[each]
Passage:
{paragraph}
Question:
{other}
Answer:
{phrase}

[/each]
Passage:
{paragraph}
Question:
{question}
Answer:
# SAMSum
Summarise the dialogue into a few short sentences. Some examples follow.
[each]
Dialogue: {name}: {sentence}
{name}: {sentence}
Summary: {sentence}
[/each]
Dialogue: {name}: {sentence}
{name}: {sentence}
Summary:
# PassageCount
Some paragraphs follow, a few of them twice or more. Determine carefully how many unique \
paragraphs \
there are.
[paragraphs]
Enter the final count of unique paragraphs, a number such as 1, 2 or 3.
The final answer is:
# PassageRetrieval-en
Thirty paragraphs of an encyclopedia and an abstract are given. Determine which paragraph the \
abstract comes from.
[paragraphs]
The abstract:
{paragraph}
Enter the number of the paragraph, like "Paragraph 1".
The answer is:
# LCC
Complete the code given below.
[code]
{python}
Next line of code:
# RepoBench-P
Complete the code given below.
[code]
# path: {noun}/{noun}.py
{python}
Next line of code:
"""
