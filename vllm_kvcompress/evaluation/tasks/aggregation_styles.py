"""Training styles of aggregation: the whole text counts, not one place in it.

See `instructions` for the format, `heldout_styles` for the styles that are never trained on.
"""

AGGREGATION = """
# report-summary
You are given a report by {a government agency|the ministry}. Write a {one-page|short} summary of it.
Report:
[sections]
{Now write the summary of the report.|}
Summary:
# meeting-query
You are given the transcript of a meeting and a query. Answer the query in one or more sentences.
[transcript]
Query: {Summarise the discussion of {topic}.|What did the group decide on {topic}?|What did everyone \
think of the {noun}?}
Answer:
# news-summary
You are given several news articles. Write one summary {that covers all of them|of all news}.
[passages]
{Now summarise all the news above.|}
Summary:
# tldr
[any]
{TL;DR|tl;dr|TLDR}{:|}
# paper-abstract
Write the abstract of this paper{ in at most {num} words|}.
[sections]
{Abstract:|}
# minutes
[transcript]
Write the minutes of this meeting{: participants, decisions, action items|}.
# bullet-points
[any]
{Sum up|Condense|Boil down} the text {in|to} {three|five|seven} bullet points.
# executive-summary
Prepare an executive summary for the board{ of {org}|}.
[any]
Executive summary:
# headline
[any]
{Suggest a headline for|Give a fitting title to} the {article|text}.
# shots-question-type
{Decide which type a question has.|Classify the question.|} {Here are some examples.|Examples:|}
[each]
Question: {other}
{Type|Type|Category}: {Person|Number|Location|Date|Description|Entity}
[/each]
Question: {question}
{Type|Type|Category}:
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
{other} {label|class|category}: {who|what|where|when|why}
[/each]
{question} {label|class|category}:
# shots-sentiment
{Label each review as positive or negative.|}
[each]
Review: {sentence}
Sentiment: {positive|negative}

[/each]
Review: {sentence}
Sentiment:
# shots-dialogue-summary
Summarise the dialogue in {a few short sentences|one sentence}. The following are some examples.
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
Answer each question by its passage and give only the answer. {These are examples.|}
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
Classify messages as spam or ham.
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
Entities: [{person} | {place} | {org}]
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
# code-next-line
{Please complete|Complete|Continue} the code {given below|of this file}.
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
Write unit tests for {every function|this module}.
# code-review
{Review the following code.|You are a careful reviewer.}
[code]
List all problems you see, {most serious first|with line numbers}.
# code-rewrite
[code]
{Rewrite|Port} this file {in|to} {TypeScript|Rust|Go|Java}.
# code-explain
[code]
Explain {what this module does|the overall structure of this code}.
# code-docstrings
Add a docstring to every function.
[code]
# count-paragraphs
There are some paragraphs below, and some of them are repeated. Find out how many different ones \
there are.
[paragraphs]
Give the number of different paragraphs {after removing repetitions|only}. The final answer is:
# count-word
[any]
{How many times|How often} {does|did} {the word|} "{magic}" {occur|appear|come up} in the \
{whole |}{text|document}{ in total|}?
# count-items
[list]
Count all {entries|items} of the list that {concern {topic}|are {adj}}. Total:
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
Read this coded text and keep track of the frequency of each word.
[words]
What are the {three|most} {words|names|numbers} that {appear|occur} most {often|frequently}?
# translate
Translate the {whole|entire|following} {text|document} into {language}.
[any]
{Translation:|}
# translate-end
[any]
{Translate this to {language}.|The same text in {language}:}
# keywords
[any]
{Extract|List} the {ten most important|} keywords of the {document|text}, separated by commas.
# compare-documents
Compare {all|the} {documents|reports} below.
[passages]
{What do they have in common|Where do they agree} and {where|how} do they {differ|contradict each \
other}?
# simplify
Rewrite the text {in plain language|for a ten-year-old|in simpler words}.
[any]
{Simplified text:|}
# restyle
[any]
{Paraphrase|Rewrite} the whole text in a {formal|friendly|neutral} tone.
# proofread
Correct all spelling and grammar mistakes in the text and return the corrected text.
[any]
# expand
[any]
Expand this {draft|outline} into a full {essay|article} of {num} words.
# timeline
[any]
Make a timeline of all events {in the text|mentioned}, oldest first.
# table-statistics
{Here are our figures.|}
[table]
{Compute the average of every column.|Describe the trends in this table.|Which groups can you \
see in the data? Describe them.}
# log-digest
[log]
{Summarise all errors of the night by category.|Group these log lines by cause and count them.}
# all-entities
[any]
List {all|every one of the} {people|places|companies} {mentioned|named} in the text.
# overall-mood
[reviews]
{What is the {overall|general} {mood|sentiment|opinion} of these reviews|What do customers like or \
dislike overall|How do people feel about it in general}?
# themes
Group the comments into themes{ and name each theme|}.
[reviews]
Themes:
# outline
[any]
{Turn the text into an outline with headings.|Draw up a mind map of the whole document.}
# make-quiz
[any]
Write {ten|five} quiz questions about the text, with answers.
# make-faq
Create an FAQ from this document: questions a reader may have, with short answers.
[any]
# reply-draft
[mail]
Draft a reply to this whole thread{ that deals with every point|}.
# continue-story
{Continue the story.|Write the next chapter.}
[story]
# no-instruction
[any]

# plot
[story]
{Retell the plot|Describe how the main characters develop} {in your own words|over the story}.
# critique
[any]
Write a critique of this text: structure, style, strength of the arguments.
# pros-cons
[any]
{What are the pros and cons overall?|List the advantages and disadvantages.|Weigh the arguments \
for and against.} {Make two lists.|}
# convert
Convert {everything below|all records} {to|into} {JSON|a Markdown table|YAML|CSV}.
[any]
# sort
[list]
Sort the {list|entries} {alphabetically|by date|by length} and print it in full.
# sum-up-numbers
[table]
{Add up all amounts.|What is the total of the last column?|What is the sum of all numbers above?|\
Compute the total.|How much is that altogether?}
# call-summary
{Call centre transcript.|}
[transcript]
Summarise the customer's problem, what the agent did, and how the call ended.
# discharge-letter
[any]
Write a discharge {letter|summary} from these notes.
# changelog
[list]
Write release notes from these commits.
# commit-message
[code]
Write a commit message for this change.
# slides
[any]
Make {slides|a ten-slide presentation} out of this document: a title and key points for each slide.
# contradictions
[passages]
List all contradictions {between|in} these statements.
# document-category
Assign the document to one of these categories: {topic}, {topic}, {topic}, other.
[any]
Category:
# main-idea
[any]
What {is|are} the main {idea|message|argument|point|points|topics} of this {text|article} {as a \
whole|}?
# whole-question
[any]
{What is this {text|document|file|conversation} about?|Which topics are covered{ here|}?|What tone does \
the author use throughout?|What patterns do you see{ across the texts|}?|How has the {noun} changed \
over all these years?|What can we conclude from all this?|Which themes come up again and again?}
# whole-count
[any]
{How many|Count how many} {different|distinct} {people|places|{noun}s|dates|topics} {are mentioned|\
are there|occur} in {total|the whole text|all}{.|?}
# list-all
[any]
{List|Enumerate|Name|Collect|Extract} {all|every|each of the} {dates|numbers|{noun}s|tasks|questions|\
requirements|facts|decisions} {in the text|mentioned|from the document|}.
# write-something
{Based on|Using|From} the {text|material|notes|document} {below|}, write {an essay|a blog post|a \
letter|a poem|a speech|an article|a report}{ about {topic}|}.
[any]
# analyse
[any]
{Analyse|Evaluate|Assess|Discuss|Interpret} the {text|arguments|data|document|style} {in depth|as a \
whole|in detail|}.
# shorten
{Shorten|Abridge|Cut} the {text|article} to {half its length|{num} words}{, keep the main points|}.
[any]
{Shortened version:|}
# recap
[any]
{Recap|Summarise|Summarize|Sum up|Give a summary of|Write a summary of} {the above|everything|what \
was said|the conversation|the key points|this}{ in {one|two|three} {sentences|paragraphs}|}.
# improve-text
[any]
{Improve|Edit|Polish|Reword|Rephrase} {this|the text|everything above}{ so that it reads better|}.
# de-summary
{Fasse den folgenden Text zusammen.|Schreibe eine kurze Zusammenfassung.}
[de]
{Zusammenfassung:|}
# de-end
[any]
{Fasse alles in fünf Stichpunkten zusammen.|Übersetze den ganzen Text ins Deutsche.|Nenne alle \
Personen, die vorkommen.|Wie oft kommt das Wort "{noun}" vor?}
# de-shots
[each]
Satz: {de}
Stimmung: {positiv|negativ}
[/each]
Satz: {de}
Stimmung:
# fr-summary
{Résume le texte suivant.|Écris un bref résumé du document.}
[fr]
{Résumé :|}
# fr-end
[any]
{Fais-en un résumé en cinq points.|Traduis tout le texte en français.|Dresse la liste de toutes \
les personnes citées.|Combien de fois le mot « {noun} » apparaît-il ?}
# fr-shots
[each]
Phrase : {fr}
Sentiment : {positif|négatif}
[/each]
Phrase : {fr}
Sentiment :
# es-summary
{Resume el texto siguiente.|Escribe un resumen breve del documento.}
[es]
{Resumen:|}
# es-end
[any]
{Haz un resumen en cinco puntos.|Traduce todo el texto al español.|Enumera todas las personas que \
se nombran.|¿Cuántas veces aparece la palabra "{noun}"?}
# es-shots
[each]
Frase: {es}
Sentimiento: {positivo|negativo}
[/each]
Frase: {es}
Sentimiento:
# zh-summary
{请总结以下文章。|为下面的报告写一段摘要。|}
[zh]
{摘要：|总结：|请总结上面的内容。}
# zh-end
[any]
{请把全文翻译成中文。|用三句话概括全文。|列出文中出现的所有人物。|统计“{noun}”一词出现的次数。}
# zh-shots
[each]
句子：{zh}
情感：{正面|负面}
[/each]
句子：{zh}
情感：
"""
