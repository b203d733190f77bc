"""Training styles of localization: something is to be found in the text.

See `instructions` for the format, `heldout_styles` for the styles that are never trained on.
"""

LOCALIZATION = """
# passages-answer
{please}answer the question {based on|using only} the {given|following} {doc}. \
{Reply with the answer alone.|Give just the answer.|}
[passages]
{Answer the question {src}.|}
Question: {question}
{out}
# story-question
You {get|are given} a {doc} and a question about it. Answer {form}.
[story]
{Now answer the question about the {doc}.|}
Question: {question}
# paper-question
You are given a scientific {article|paper} and a question. Answer with a phrase or a sentence \
from the article. If the article does not say, write "unanswerable".
[sections]
Question: {question}
{Answer:|Your answer:}
# bare-question
[any]
{please|}{question}
# q-a-line
[any]
Q: {question}
A:
# according-to
[any]
{According to|Based on|Judging by} {the|this} {doc}, {ask}
# question-first
{{question}|Question: {question}|I {want|need} to know {ask}}
{The answer is somewhere in this {doc}|Use the {doc} below to find out|Look here|Context|Passage}:
[any]
{out}
# question-twice
Question: {question}
{Keep it in mind while you read.|Read on to answer it.}
[any]
{So, once more|Again|The question was}: {question}
# exam
READING COMPREHENSION. Read the {doc} carefully, then answer the question below it.
[prose]
{num}. {question}
{({num} points)|Write your answer here:|}
# multiple-choice
Read the {doc} and choose the {correct|best} option.
[any]
{question}
A. {phrase}
B. {phrase}
C. {phrase}
D. {phrase}
{Correct option:|Answer with one letter.|The letter of the right answer is|{out}}
# multiple-choice-bare
[any]
{question}
(A) {phrase} (B) {phrase} (C) {phrase}
# multi-hop
The {doc} below hold the facts needed for the question. \
{Combine them where you must.|Reason over several of them.}
[passages]
{Question|Multi-hop question}: {question}
{Short answer:|Final answer:|So the answer is}
# log-incident
{Here is the log of our server.|These are last night's logs.|}
[log]
{When was the {noun} first {verb}?|Which host failed right before {time}?|What is the id of the \
first error after {time}?|{please}{locate} the {target} of the request that was {verb}.}
# contract-clause
{You are a {paralegal|lawyer} and you look things up in agreements.|}
[sections]
{Under which clause may the tenant leave early?|What notice period does the contract set for the \
{noun}?|Which party pays for the {noun}, and where does it say so?|Which section governs {topic}?}
# manual
{This is the manual of my {noun}.|Manual:|}
[sections]
{How do I reset the {noun}?|Which button do I press to open the {noun}?|What does error {num} \
mean?|How often must the {noun} be cleaned?|Where do I connect the {noun}?}
# magic-number
{Some special magic numbers are hidden in the {doc} below. Remember them, I will ask for \
one.|A special magic number is hidden in this {doc}. Remember it.}
[any]
What is the special magic number for {magic} {src}? {The special magic number for {magic} is|}
# pass-key
Somewhere in a lot of irrelevant text there is one important {target}. Find it and remember it.
[any]
What is the {pass key|password|{target}}? The {pass key|password|{target}} is
# secret-code
[any]
What is the {secret|hidden} {target} {that was mentioned|} {src}? {Write only the {target}.|}
# key-value
Below is a {JSON object|dictionary|table} with keys and values. {please}{locate} the value of the \
key I name.
[records]
Key: "{key}"
{Corresponding value:|Value:|{out}}
# key-value-ask
[records]
{What is|{please}{locate}} the value {stored under|of|for} "{key}"?
# line-lookup
Every line of this record starts with its name. You will be asked for the content of one line.
[table]
{please}{locate} the {content|{target}} of {line|entry|record} {noun}-{noun}. \
{The content is|It says|}
# find-sentence
[any]
{please}{locate} the {target} {src} {that mentions|that speaks of|about|containing|on} \
{{topic}|{who}}{ and copy it|}.
# quote-evidence
[any]
{please}{locate}{, word for word,| exactly} the {passage|sentence|lines} that \
{supports|proves|shows} {this statement|the claim}: "{sentence}"
# which-paragraph-says
[paragraphs]
In which {paragraph|section} does it say that {topic} was discussed by {who}?
# yes-no
[any]
{Is it true that {who} {verb} the {noun}?|Did {who} {verb} the {noun}?|Does {org} have a \
{noun}?|Was the {noun} ever {verb}?|Has {who} been to {place}?} {{Answer|Say|Reply} yes or no|} \
{src}.
# claim-check
Decide whether the {doc} supports the claim{: supported, refuted or not mentioned|}.
[any]
Claim: {sentence}
{Verdict:|Supported, refuted or not mentioned?|{out}}
# patient-record
{Patient record|Discharge notes}:
[any]
{What dose of the {noun} drug was given on {date}?|Which allergy does {who} have?|What was the \
patient's blood pressure on admission?|Who was the surgeon?}
# search-results
{please}answer the user's question with the search results below and cite them like [1]. \
{If they do not hold the answer, say that you do not know.|Do not use other knowledge.}
[passages]
{User question|User|Question}: {question}
# rag-context
Use the pieces of context to {answer|reply to} the question at the end. \
{Never make up an answer.|If you don't know, say so.}
Context:
[passages]
Question: {question}
{Helpful answer:|Answer:}
# rag-not-prior
Context information is below.
[any]
{With this context and no prior knowledge, answer the query.|Given only this information, reply.}
Query: {question}
{out}
# tagged-question
<context>
[any]
</context>
<question>{question}</question>
{Put your answer in <answer> tags.|}
# support-desk
You are a support agent of {org}. Rely only on the {doc} and stay polite.
[faq]
Customer: {question}
Agent:
# code-where
{Here is a source file.|File {noun}.py:|}
[code]
{Which function {reads|writes} the {noun}?|In which line is `{noun}` defined?|Where is the {noun} \
checked for null?|{please}{locate} the line that sets `{noun}`.|Which class inherits from \
{surname}?}
# code-value
[code]
{What does `{verb}` return when the {noun} is empty?|What is the default of the parameter \
`{noun}`?|Which exception is raised if `{noun}` is missing?|What is the type of `{noun}`?}
# table-cell
[table]
{What is the {noun} of {person}?|Which {noun} belongs to {place}?|Give the number in the row of \
{org}.|Who has {num} in the last column?|{please}{locate} the {target} for {org}.}
# chat-who
{The following is a chat between friends.|Conversation:|}
[dialogue]
{Who suggested {topic}?|When does {who} arrive?|What did {who} buy for {name}?|Where will they \
meet?}
# mail-fact
[mail]
{When is the meeting with {who}?|What is the tracking number of the {noun}?|Who else was copied on \
the mail about the {noun}?|{please}{locate} the {target} that {who} sent.}
# fill-blank
{Fill the blank with words of the {doc}.|Complete the sentence from the {doc}.}
[any]
{{who} ____ the {noun} in {year}.|The {noun} was {verb} in ____.|____ is the owner of the {noun}.}
# extract-name
{please}{locate} the {target} of the {person who {verb} the {noun}|company that owns \
the {noun}|city where {who} lives} {src}{ and nothing else|}.
[any]
{Name:|{out}}
# extract-date
[any]
On which date was the {noun} {verb}? {Respond with the date {form}.|}
# json-answer
{Look up the answer in the {doc}.|}
[any]
{question} Respond as JSON: {lb}"answer": "..."{rb}
# short-answer-only
[any]
{question} {Answer in at most five words.|One word is enough.|Just the name, please.|Answer {form}.}
# informal
[any]
{hey can you check {src}|pls look up|quick one,|sorry one thing:} {ask}
# section-locate
[sections]
{Where {src} is|In which section is|On which page is|Which page says that} {topic} \
{discussed|mentioned}? {Give its number.|}
# bridging
{please}answer the question. {You have to go through two of the texts to find the answer.|}
[passages]
{What is the nationality of the director of {noun}?|In which city was the founder of {org} \
born?|Who is the mother of the author of "{adj} {noun}"?|{question}}
# handbook
{You answer staff questions from the employee handbook.|Employee handbook of {org}}
[sections]
{How many days of leave do I get after {num} years?|May I work from {place}?|Who approves travel \
costs?|Am I allowed to take the {noun} home?}
# judgment
{The judgment of the court reads as follows.|Read the judgment.}
[paragraphs]
{What sentence did {who} receive?|Which article did the judge rely on?|When was the appeal \
filed?}
# annual-report
From the annual report of {org}:
[sections]
{What was the revenue in {year}?|Who chairs the board?|By how many percent did the {noun} grow in \
{year}?|{please}{locate} the {target} for {year}.}
# not-found
{please}answer from the {doc} below. If the answer is not in it, reply "not found".
[any]
{question}
# interview
[transcript]
What {did|does} {who} {say|think|claim} about {topic} {src}?
# question-list
{please}answer these questions {src}{, one line each|}.
[any]
1. {question}
2. {other}
3. {other}
# word-code
Each word below belongs to a code. {Memorise the codes.|}
[records]
{{please}{locate}|What is} the {target} {that belongs to|for|stored with} {the word|} "{magic}"{.|?}
# follow-up
{You are discussing a {doc} with a user.|}
[any]
{One more question about the {doc}|Thanks! And another thing|OK, next}: {ask}
# api-docs
API reference of {org}
[sections]
{Which endpoint do I call to create a {noun}?|What status code means that the {noun} was \
{verb}?|Which parameter limits the number of {noun}s?}
# how-much
[any]
{How many grams of {noun} does it take?|How much does the {adj} {noun} weigh?|What is the price of \
the {noun}?|How far is {place} from the {noun}?}
# definition
[any]
{How does the {doc} define|What is meant by|What does the {doc} mean by|How is} "{noun}" {src}?
# span
[any]
{please}{locate} the {span|words|{target}} that {answers|answer} the question "{question}"
{Span:|{out}}
# reason-given
[any]
What {reason|explanation} {does|did} {who} give for leaving {place}? {Refer to the {doc}.|}
# detail-hunt
I am looking for one {detail|{target}} in this {doc}.
[any]
{What phone number is given for {org}?|Which serial number does the {noun} have?|What is the \
street address of {who}?|It must be the {target} of {org}.}
# find-imperative
[any]
{please}{locate} the {target} {when|where|why|for which|at which} {the {noun} was {verb}|{who} \
{verb} the {noun}} {src} {form}.
# find-imperative-first
{please}{locate} the {target} {of {org}|of {who}|of the {adj} {noun}|in which the {noun} was \
{verb}|that {who} {verb}} {src} {form}.
[any]
{out}
# look-up-field
{Look up one value in the {doc}.|}
[any]
{please}{locate} the {target} of {{who}|{org}|the {adj} {noun}} {form}.
# tell-me
[any]
{Tell me|Do you know|I'd like to know|Please tell me|I was wondering|Can you tell me|Find out|\
Check|Say} {who|when|where|why|whether|how|which {noun}} {the {noun} was {verb}|{who} {verb} the \
{noun}} {src}.
# given-the-text
Given the {doc}, {answer the question|reply to the user's question|respond to the query}{ below|}.
[any]
{Question|Query|User}: {question}
# specific-question
I have a {specific|simple|factual} question about {this|the} {doc}.
[any]
{{question}|My question: {question}}
# facts-only
{Only use facts stated in the {doc}.|Stick to the {doc}.|Base your answer on the source alone.}
[any]
{question}
{out}
# number-answer
[any]
{question} {Answer with a number{ only|}.|Give the exact figure.|Write only the number.}
# answer-format
{please}{answer|respond} {form}.
[any]
Question: {question}
{out}
"""
