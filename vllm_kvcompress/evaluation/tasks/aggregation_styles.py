"""Training styles of aggregation: the whole text counts, not one place in it.

See `instructions` for the format, `heldout_styles` for the styles that are never trained on.
"""

AGGREGATION = """
# report-summary
You are given a {doc} by {a government agency|the ministry|{org}}. {please}write a \
{one-page|short} \
summary of it.
[sections]
{Now write the summary of the {doc}.|}
Summary:
# meeting-query
You are given the transcript of a meeting and a query. Answer the query {form}.
[transcript]
Query: {Summarise the discussion of {topic}.|What did the group decide on {topic}?|What did \
everyone \
think of the {noun}?|What was discussed on {topic}?|Summarise {who}'s opinion of the {noun}.}
{out}
# news-summary
You are given several news articles. {please}write one summary {that covers all of them|of all \
news}.
[passages]
{Now summarise all the news above.|}
{Summary:|{out}}
# tldr
[any]
{TL;DR|tl;dr|TLDR}{:|}
# paper-abstract
{please}write the abstract of this {paper|{doc}} {form}.
[sections]
{Abstract:|{out}}
# minutes
[transcript]
{please}write the minutes of this meeting{: participants, decisions, action items|}.
# bullet-points
[any]
{please}{sum up|condense|boil down|{rework}} the {doc} {in|to} {three|five|seven} bullet points.
# executive-summary
{please}{write} an executive summary for the board{ of {org}|}.
[any]
{Executive summary:|{out}}
# headline
[any]
{please}{suggest|{write}} a {headline|title|fitting title} for the {doc}.
# shots-question-type
{Decide which type a question has.|Classify the question.|} {Here are some examples.|Examples:|}
[each]
Question: {other}
Type: {Person|Number|Location|Date|Description|Entity}
[/each]
Question: {question}
Type:
# shots-question-answer
{Answer the questions like in the examples.|}
[each]
Question: {other}
Answer: {phrase}

[/each]
Question: {question}
Answer:
# shots-question-label
[each]
{other} label: {who|what|where|when|why}
[/each]
{question} label:
# shots-sentiment
{Label each review as positive or negative.|}
[each]
Review: {sentence}
Sentiment: {positive|negative}

[/each]
Review: {sentence}
Sentiment:
# shots-dialogue-summary
{Summarise the dialogue {form}.|} {The following are some examples.|Examples:|}
[each]
Dialogue: {name}: {sentence}
{name}: {sentence}
{name}: {sentence}
Summary: {sentence}

[/each]
Dialogue: {name}: {sentence}
{name}: {sentence}
Summary:
# shots-passage-answer
{Answer each question by its passage {form}.|} {These are examples.|Here are examples.|}
[each]
Passage: {paragraph}
Question: {other}
Answer: {phrase}

[/each]
Passage: {paragraph}
Question: {question}
Answer:
# shots-input-output
[each]
Input: {sentence}
Output: {phrase}
[/each]
Input: {sentence}
Output:
# shots-arrow
[each]
{phrase} => {noun}
[/each]
{phrase} =>
# shots-spam
{Classify messages as spam or ham.|}
[each]
Message: {sentence} Class: {spam|ham}
[/each]
Message: {sentence} Class:
# shots-intent
{Assign an intent to the customer's request, like in the examples.|}
[each]
text: {other}
intent: {card_lost|refund|balance|transfer|cancel|exchange_rate}

[/each]
text: {other}
intent:
# shots-entities
Tag the entities as shown.
[each]
Sentence: {sentence}
Entities: [{person}, {place}, {org}]
###
[/each]
Sentence: {sentence}
Entities:
# shots-translation
[each]
English: {sentence}
French: {fr}

[/each]
English: {sentence}
French:
# shots-topic
[each]
<text>{paragraph}</text>
<label>{sports|business|science|politics}</label>
[/each]
<text>{paragraph}</text>
<label>
# shots-relation
[each]
Premise: {sentence}
Hypothesis: {sentence}
Label: {entailment|neutral|contradiction}

[/each]
Premise: {sentence}
Hypothesis: {sentence}
Label:
# shots-bare
[each]
{sentence}
{topic}

[/each]
{sentence}

# code-next-line
{please}{complete|continue|finish} the code {given below|of this file}.
[code]
{Next line of code:|The next line is:|}
# code-repository
Below are some files of a repository{, separated by their paths|}. Complete the last one.
[code]
# {noun}/{noun}.py
import {noun}

{python}
def {verb}_{noun}(
# code-plain
[code]
    def {noun}(self, {noun}):
# code-plain-braces
[code]
{braces}
    if ({noun}.
# code-tests
[code]
{please}{write} unit tests for {every function|this module|the code}.
# code-review
{{please}review the following code.|You are a careful reviewer.}
[code]
{please}{list|report} all problems you see, {most serious first|with line numbers}.
# code-rewrite
[code]
{please}{rewrite|port|convert|refactor|optimise} this {file|code} {in|to} {TypeScript|Rust|Go|Java}.
# code-explain
[code]
{please}explain {what this module does|the overall structure of this code} {form}.
# code-docstrings
{please}{add|{write}} {a docstring|comments|type hints} {to|for} every function.
[code]
# count-paragraphs
There are some paragraphs below, and some of them are repeated. Find out how many different ones \
there are.
[paragraphs]
Give the number of different paragraphs {after removing repetitions|only}. The final answer is:
# count-word
[any]
{How many times|How often} {does|did} {the word|} "{magic}" {occur|appear|come up} {src} {in \
total|}?
# count-items
[list]
{please}count {everything} {src} that {concern {topic}|are {adj}}. {Total:|{out}}
# count-speakers
[dialogue]
How many {different|distinct} {people|speakers|persons} {take part|speak|are there} in the \
conversation{, and how often does each speak|}?
# which-paragraph-abstract
Here are {num} paragraphs of an encyclopedia and an abstract. Find the paragraph the abstract was \
made from.
[paragraphs]
Abstract: {paragraph}
{Write the number of the paragraph.|} The answer is: Paragraph
# common-words
Below is a numbered list of words, some occur more often than others.
[words]
What are the {ten|five} most common words in the list? {The most common words are:|}
# coded-frequency
{Read this coded text and keep track of the frequency of each word.|}
[words]
What are the {three|most} {words|names|numbers} that {appear|occur} most {often|frequently}?
# translate
{please}translate the {whole|entire|following} {doc} into {language}.
[any]
{Translation:|{out}}
# translate-end
[any]
{{please}translate {this|the {doc}|everything} to {language} {form}.|The same text in {language}:}
# keywords
[any]
{please}{extract|list|{write}} the {ten most important|} keywords {src}, separated by commas.
# compare-documents
{please}compare {all|the} {doc} below.
[passages]
{What do they have in common|Where do they agree} and {where|how} do they {differ|contradict each \
other}?
# simplify
{please}rewrite the {doc} {in plain language|for a ten-year-old|in simpler words}.
[any]
{Simplified text:|{out}}
# restyle
[any]
{please}{paraphrase|rewrite} the whole {doc} in a {formal|friendly|neutral} tone.
# proofread
{please}correct all {spelling and grammar |}mistakes {src} and return the corrected {doc}.
[any]
# expand
[any]
{please}expand this {draft|outline} into a full {essay|article} of {num} words.
# timeline
[any]
{please}{write} a timeline of all events {src}, oldest first.
# table-statistics
{Here are our figures.|}
[table]
{Compute the average of every column.|Describe the trends in this table.|Which groups can you \
see in the data? Describe them.|Plot all of the data.}
# log-digest
[log]
{Summarise all errors of the night by category.|Group these log lines by cause and count them.}
# all-entities
[any]
{please}list {all|every one of the} {people|places|companies} {mentioned|named} {src}.
# overall-mood
[reviews]
{What is the {overall|general} {mood|sentiment|opinion} of these reviews|What do customers like or \
dislike overall|How do people feel about it in general}?
# themes
{please}group the {comments|{noun}s} into themes{ and name each theme|}.
[reviews]
{Themes:|{out}}
# outline
[any]
{{please}turn the {doc} into an outline with headings.|Draw up a mind map of the whole {doc}.}
# make-quiz
[any]
{please}{write} {ten|five} {quiz|exam|study} questions about the {doc}, with answers.
# make-faq
{please}{write} an FAQ from this {doc}: questions a reader may have, with short answers.
[any]
# reply-draft
[mail]
{please}draft a reply to this whole thread{ that deals with every point|}.
# continue-story
{{please}continue the {story|{doc}}.|Write the next chapter.}
[story]
# no-instruction
[any]

# plot
[story]
{please}{Retell the plot|Describe how the main characters develop} {in your own words|over the \
story}.
# critique
[any]
{please}write a critique of this {doc}: structure, style, strength of the arguments.
# pros-cons
[any]
{What are the pros and cons overall?|List the advantages and disadvantages.|Weigh the arguments \
for and against.} {Make two lists.|}
# convert
{please}convert {everything below|all records|the {doc}} {to|into} {JSON|a Markdown table|YAML|CSV}.
[any]
# sort
[list]
{please}sort the {list|entries|{doc}} {alphabetically|by date|by length} and print it in full.
# sum-up-numbers
[table]
{{please}add up all {amounts|numbers}.|What is the total of the last column?|What is the sum of \
all \
numbers above?|Compute the total.|How much is that altogether?}
# call-summary
{Call centre transcript.|}
[transcript]
Summarise the customer's problem, what the agent did, and how the call ended.
# discharge-letter
[any]
{please}{write} a discharge {letter|summary} from these notes.
# changelog
[list]
{please}{write} release notes from these commits.
# commit-message
[code]
{please}{write} a commit message for this change.
# slides
[any]
{please}{write} {slides|a ten-slide presentation} out of this {doc}: a title and key points for \
each.
# contradictions
[passages]
{please}list all contradictions {between|in} these {statements|{doc}}.
# document-category
{please}assign the {doc} to one of these categories: {topic}, {topic}, {topic}, other.
[any]
{Category:|{out}}
# whole-question
[any]
{global} {Answer {form}.|}
# whole-question-labelled
{Read the {doc}.|Answer the question at the end.|}
[any]
Question: {global}
{out}
# whole-question-first
{global} {Answer {form}.|}
[any]
# rework-end
[any]
{please}{rework} {this {doc}|the {doc}|the text above|everything|the whole {doc}|it} {form}.
# rework-first
{please}{rework} {this {doc}|the {doc} below|the following|everything|all of the {doc}} {form}{.|:}
[any]
{out}
# write-end
[any]
{Based on the {doc}, |Using all this, |From these notes, |}{please}{write} {product} {form}.
# write-first
{please}{write} {product} {src} {form}.
[any]
{out}
# everything-end
[any]
{please}{list|enumerate|count|collect|extract|name|compare|sort|group|explain} {everything} \
{src} {form}.
# everything-first
{please}{list|enumerate|count|collect|extract|name|compare|sort|group|explain} {everything} \
{src} {form}.
[any]
{out}
"""
